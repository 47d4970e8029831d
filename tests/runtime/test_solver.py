"""The solver tables against diffusers' schedulers, over whole trajectories of a made-up nonlinear model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptmaster.errors import InputError
from conceptmaster.runtime import solver

STEPS = (1, 2, 3, 4, 10, 20, 50)
SHIFTS = (1.0, 3.0, 5.0, 8.0)


def model(x: np.ndarray, time: float) -> np.ndarray:
    """A velocity that bends: x [n] float64, time 0..1000."""
    return np.tanh(1.3 * x) * (0.5 + time / 1000) + 0.3 * np.cos(3 * x + time / 150)


def run(schedule: solver.Schedule, noise: np.ndarray) -> np.ndarray:
    """Follows a table from noise [n]; returns the stacked states [M, n] after the last step."""
    state = np.zeros((solver.STATES, noise.size))
    state[0] = noise
    for time, coefficients in zip(schedule.timesteps, schedule.coefficients, strict=True):
        velocity = model(state[0], float(time))
        state = coefficients.astype(np.float64) @ np.concatenate([state, velocity[None]])
    return state


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(256)


def diffusers_scheduler(name: str, shift: float):
    pytest.importorskip("diffusers")
    if name.startswith("euler"):
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=shift)
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


@pytest.mark.parametrize("name", solver.SOLVERS)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
def test_trajectory_equals_diffusers(name: str, shift: float, steps: int, noise: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    scheduler = diffusers_scheduler(name, shift)
    if name == "euler_trailing":
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps))
    else:
        scheduler.set_timesteps(steps)
    if name == "unipc_wan":  # the grid of Wan's FlowUniPCMultistepScheduler
        grid = np.linspace(0.999, 0.0, steps + 1)[:-1]
        grid = shift * grid / (1 + (shift - 1) * grid)
        scheduler.sigmas = torch.from_numpy(np.append(grid, 0.0).astype(np.float32))
        scheduler.timesteps = torch.from_numpy(grid * 1000).to(torch.int64)
    scheduler.set_begin_index(0)
    schedule = solver.make_schedule(name, steps, shift)
    # diffusers shifts sigmas that it is given in float32; here all is float64 until the end
    rounding = 1e-6 if name == "euler_trailing" else 2e-7
    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    np.testing.assert_allclose(schedule.sigmas, scheduler.sigmas.numpy(), rtol=rounding)
    if name.startswith("unipc"):
        scheduler.sigmas = scheduler.sigmas.double()  # its coefficients in float64 too
    sample = torch.from_numpy(noise)[None]  # [1, n]
    for time in scheduler.timesteps:
        velocity = torch.from_numpy(model(sample[0].numpy(), float(time)))[None]
        sample = scheduler.step(velocity, time, sample, return_dict=False)[0]
    expected = sample[0].double().numpy()
    error = np.linalg.norm(run(schedule, noise)[0] - expected) / np.linalg.norm(expected)
    assert error <= 1e-5


@pytest.mark.parametrize("name", solver.SOLVERS)
def test_final_state_holds_the_estimate_twice(name: str, noise: np.ndarray) -> None:
    """The last step lands on the newest estimate, so result and preview agree."""
    state = run(solver.make_schedule(name, 7, 3.0), noise)
    np.testing.assert_allclose(state[0], state[2], rtol=1e-12, atol=1e-12)


@given(
    name=st.sampled_from(solver.SOLVERS),
    steps=st.integers(1, 1000),
    shift=st.floats(*solver.SHIFTS, allow_nan=False),
)
@settings(max_examples=60, deadline=None)
def test_table_is_finite_and_exact_for_a_straight_path(name: str, steps: int, shift: float) -> None:
    """If v is constant the path is a line: every solver must end on x - sigma v. And no step stands still."""
    schedule = solver.make_schedule(name, steps, shift)
    assert schedule.coefficients.shape == (steps, solver.STATES, solver.STATES + 1)
    assert schedule.coefficients.dtype == schedule.timesteps.dtype == np.float32
    assert np.isfinite(schedule.coefficients).all()
    assert schedule.timesteps.max() <= 1000 and schedule.timesteps.min() >= 0
    assert (np.diff(schedule.sigmas) < 0).all() and schedule.sigmas[-1] == 0
    state = np.zeros(solver.STATES)
    state[0] = 0.7
    for coefficients in schedule.coefficients.astype(np.float64):
        state = coefficients @ np.append(state, 0.4)
    assert state[0] == pytest.approx(0.7 - 0.4 * schedule.sigmas[0], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "steps", "shift", "word"),
    [
        ("heun", 5, 1.0, "solver"),
        ("euler", 0, 1.0, "steps"),
        ("euler", 1001, 1.0, "steps"),
        ("euler", 5, 0.0, "shift"),
        ("euler", 5, float("nan"), "shift"),
        ("euler", 5, float("inf"), "shift"),
    ],
)
def test_wrong_input(name: str, steps: int, shift: float, word: str) -> None:
    with pytest.raises(InputError, match=word):
        solver.make_schedule(name, steps, shift)
