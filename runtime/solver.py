"""Flow-matching solvers as tables of numbers.

With x_t = (1 - sigma) data + sigma noise the model gives v = noise - data. Every multistep solver here is
linear in what it has seen, so one step is one small matrix product,

    next_state[m] = sum_j coefficients[step, m, j] * [state_0, state_1, state_2, state_3, v][j],

done inside the denoise graph with the matrices made here, on the host, in float64. The state's slots are

    0  the point at which the model is evaluated next; after the last step, the result
    1  UniPC's last corrected sample
    2  the newest estimate of the data, x0 = x - sigma v (every solver fills it: it is the preview)
    3  the estimate before that

The tables give the numbers of diffusers 0.42.1: `FlowMatchEulerDiscreteScheduler(shift=...)` and
`UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=...)`, both begun
at step 0. `euler_trailing`, for few steps, is the first with `sigmas=linspace(1, 1/steps, steps)`, as
diffusers' pipelines for Flux call it. `unipc_wan` is UniPC on the grid of Wan's own programs
(FlowUniPCMultistepScheduler, and diffusers before 0.37), which ends nearer to the video. (Left to itself,
diffusers' UniPC skips its first step when truncation makes the first two timesteps equal, as with 200 steps
and shift 8; here no step is ever skipped.) UniPC: Zhao et
al., arXiv 2302.04867, B(h) = expm1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

Array = np.ndarray

STATES = 4  # M: state slots
MODEL = STATES  # the column that multiplies the model's velocity
TRAINED_STEPS = 1000  # timesteps run from 1000 (noise) down to 0 (data)
SOLVERS = ("euler", "unipc", "unipc_wan", "euler_trailing")
SHIFTS = (0.01, 100.0)  # outside, neighbouring sigmas are no longer distinct in float32


@dataclass(frozen=True)
class Schedule:
    """One solver's table.

    sigmas: float64 [steps + 1], noise level before each step, then 0 (float32 values, as diffusers keeps
    them); timesteps: float32 [steps], the model's time input; coefficients: float32 [steps, M, M + 1].
    """

    solver: str
    sigmas: Array
    timesteps: Array
    coefficients: Array


def make_schedule(solver: str, steps: int, shift: float) -> Schedule:
    """Builds the table of `solver` for `steps` model evaluations.

    Args: solver: one of SOLVERS; steps: 1..1000; shift: in SHIFTS, above 1 it spends more steps on noise.
    Raises: InputError for anything else.
    """
    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r}: choose one of {', '.join(SOLVERS)}")
    if not 1 <= steps <= TRAINED_STEPS:
        raise InputError(f"steps must be 1 to {TRAINED_STEPS}, not {steps}")
    if not SHIFTS[0] <= shift <= SHIFTS[1]:
        raise InputError(f"shift must be {SHIFTS[0]} to {SHIFTS[1]}, not {shift}")
    times, table = METHODS[solver]
    sigmas, timesteps = times(steps, shift)
    sigmas = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)  # [steps + 1]
    coefficients = table(sigmas)  # [steps, M, M + 1]
    return Schedule(solver, sigmas, timesteps.astype(np.float32), coefficients.astype(np.float32))


def _shifted(sigma: Array, shift: float) -> Array:
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def _euler_times(steps: int, shift: float) -> tuple[Array, Array]:
    # diffusers spaces the steps between the shifted ends and shifts them once more.
    lowest = _shifted(np.array(1.0 / TRAINED_STEPS), shift)
    sigmas = _shifted(np.linspace(1.0, lowest, steps), shift)  # [steps]
    return sigmas, sigmas * TRAINED_STEPS


def _trailing_times(steps: int, shift: float) -> tuple[Array, Array]:
    # None lands near 0, where one step of few would be wasted.
    sigmas = _shifted(np.linspace(1.0, 1.0 / steps, steps), shift)  # [steps]
    return sigmas, sigmas * TRAINED_STEPS


def _unipc_times(steps: int, shift: float) -> tuple[Array, Array]:
    sigmas = _shifted(np.linspace(1.0, 1.0 / TRAINED_STEPS, steps + 1)[:-1], shift)  # [steps]
    if abs(sigmas[0] - 1.0) < 1e-6:
        sigmas[0] -= 1e-6  # at exactly 1 the log signal-to-noise ratio is infinite
    return sigmas, np.trunc(sigmas * TRAINED_STEPS)


def _wan_times(steps: int, shift: float) -> tuple[Array, Array]:
    most = 1.0 - 1.0 / TRAINED_STEPS
    sigmas = _shifted(np.linspace(most, 0.0, steps + 1)[:-1], shift)  # [steps]
    return sigmas, np.trunc(sigmas * TRAINED_STEPS)


def _euler_table(sigmas: Array) -> Array:
    table = np.zeros((len(sigmas) - 1, STATES, STATES + 1))
    for step, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        table[step, 0, [0, MODEL]] = 1.0, following - sigma
        table[step, 2, [0, MODEL]] = 1.0, -sigma
    return table


def _unipc_table(sigmas: Array) -> Array:
    steps = len(sigmas) - 1
    table = np.zeros((steps, STATES, STATES + 1))
    x, last, newest, before, velocity = np.eye(STATES + 1)  # every quantity below is a row in this basis
    order = 0  # of the predictor that made slot 0
    for step in range(steps):
        estimate = x - sigmas[step] * velocity
        corrected = x
        if step > 0:
            corrected = _unipc_correct(sigmas, step, order, last, estimate, newest, before)
        order = min(2, step + 1, steps - step)  # first order at both ends
        predicted = _unipc_predict(sigmas, step, order, corrected, estimate, newest)
        table[step] = np.stack([predicted, corrected, estimate, newest])  # [M, M + 1]
    return table


def _log_snr(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma)


def _unipc_predict(
    sigmas: Array, step: int, order: int, sample: Array, newest: Array, before: Array
) -> Array:
    """UniP: from `sample` at sigmas[step] to sigmas[step + 1]; newest, before: x0 there and one step
    earlier.
    """
    sigma, following = sigmas[step], sigmas[step + 1]
    if following == 0.0:
        return newest  # h is infinite: the step lands on the estimate
    h = _log_snr(following) - _log_snr(sigma)
    growth = (1.0 - following) * math.expm1(-h)
    result = following / sigma * sample - growth * newest
    if order == 2:
        ratio = (_log_snr(sigmas[step - 1]) - _log_snr(sigma)) / h
        result = result - growth * 0.5 * (before - newest) / ratio
    return result


def _unipc_correct(
    sigmas: Array, step: int, order: int, last: Array, estimate: Array, newest: Array, before: Array
) -> Array:
    """UniC: redoes the step from sigmas[step - 1] to sigmas[step] knowing the estimate at its end.

    last: the sample at its start; newest, before: x0 at its start and one step earlier.
    """
    sigma, following = sigmas[step - 1], sigmas[step]
    h = _log_snr(following) - _log_snr(sigma)
    expm1 = math.expm1(-h)
    growth = (1.0 - following) * expm1
    result = following / sigma * last - growth * newest
    if order == 1:
        return result - growth * 0.5 * (estimate - newest)
    ratio = (_log_snr(sigmas[step - 2]) - _log_snr(sigma)) / h
    phi_2 = expm1 / -h - 1.0
    phi_3 = phi_2 / -h - 0.5
    weights = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], [phi_2 / expm1, 2.0 * phi_3 / expm1])
    return result - growth * (weights[0] * (before - newest) / ratio + weights[1] * (estimate - newest))


METHODS: dict[str, tuple[Callable[[int, float], tuple[Array, Array]], Callable[[Array], Array]]] = {
    "euler": (_euler_times, _euler_table),
    "unipc": (_unipc_times, _unipc_table),
    "unipc_wan": (_wan_times, _unipc_table),
    "euler_trailing": (_trailing_times, _euler_table),
}
"""Of each solver the grid of its sigmas and timesteps, and its table."""
