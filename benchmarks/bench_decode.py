"""Graphs that decode one, two or four latent frames a call: ONNX Runtime on one thread, in turn, over the
same four latent frames. The shipped model's decoder, and one of Wan2.1's form, narrow, with random weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .alternating import alternate, report
from .reports import ROOT

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

A_CALL = (1, 2, 4)
"""Latent frames."""
ROUNDS = {"sprites": 40, "wan-like": 7}
WAN_LIKE = {
    "base_dim": 32,
    "z_dim": 4,
    "patch_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
}


@pytest.fixture(scope="module", params=list(ROUNDS))
def decoding(request: pytest.FixtureRequest) -> tuple[str, Any, Any, Any]:
    """Name, the VAE's streaming modules for the first latent frame and for later ones, latents."""
    import dataclasses

    from conceptmaster.engine.checkpoints.source import open_source
    from conceptmaster.engine.presets import preset
    from conceptmaster.engine.vae.wan_decoder import build_vae, streaming_decoders

    torch.manual_seed(0)
    if request.param == "sprites":
        vae: Any = open_source(str(ROOT / "examples" / "sprites" / "weights")).vae
        latents = torch.randn(1, 128, 1 + max(A_CALL), 8, 8)
    else:
        vae = build_vae(dataclasses.replace(preset("tiny"), vae=WAN_LIKE))
        latents = torch.randn(1, 4, 1 + max(A_CALL), 8, 12)
    return request.param, *streaming_decoders(vae), latents


@pytest.mark.filterwarnings("ignore")
def test_decode(
    benchmark: Any, decoding: tuple[str, Any, Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The frames of all are the same."""
    from conceptmaster.export.graphs import GraphSpec, _tensor_spec
    from conceptmaster.export.onnx_graphs.trace import export_graph
    from conceptmaster.export.verify import open_session

    name, first, later, latents = decoding
    with torch.inference_mode():
        states = first(latents[:, :, :1])[1:]
    rivals, frames = {}, []
    for count in A_CALL:
        given = latents[:, :, 1 : 1 + count].contiguous()
        with torch.inference_mode():
            made = later(given, *states)
        inputs = {"latents": given, **{f"state_{i:02}": state for i, state in enumerate(states)}}
        outputs = {"frames": made[0], **{f"next_state_{i:02}": state for i, state in enumerate(made[1:])}}
        taken, told = (tuple(_tensor_spec(*item) for item in named.items()) for named in (inputs, outputs))
        sample: Callable[[int], Any] = functools.partial(_same, inputs)
        path = tmp_path / f"{count}.onnx"
        export_graph(GraphSpec("decode", later.eval(), taken, told, sample), path)
        session = open_session(str(path), path)
        rivals[f"{count} a call"] = functools.partial(
            _decode, session, latents[:, :, 1:].numpy(), states, count
        )
        frames.append(rivals[f"{count} a call"]())
    assert all(np.abs(each - frames[0]).max() < 1e-4 for each in frames)
    measured = alternate(benchmark, rivals, ROUNDS[name])
    with capsys.disabled():
        print(report(measured, f"four latent frames, {name}, 1 thread"))


def _same(inputs: Mapping[str, Any], seed: int) -> Mapping[str, Any]:
    return inputs


def _decode(session: Any, latents: np.ndarray, states: Any, count: int) -> np.ndarray:
    names = [output.name for output in session.get_outputs()]
    held = {f"state_{i:02}": state.numpy() for i, state in enumerate(states)}

    def calls() -> Iterator[np.ndarray]:
        nonlocal held
        for first in range(0, latents.shape[2], count):
            given = np.ascontiguousarray(latents[:, :, first : first + count])
            found = dict(zip(names, session.run(None, {"latents": given, **held}), strict=True))
            yield found.pop("frames")
            held = {name.removeprefix("next_"): value for name, value in found.items()}

    return np.concatenate(list(calls()))
