"""The command that trains, as it is typed, on a machine that has little installed, and killed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conceptmaster.engine.checkpoints.safetensors_io import load
from conceptmaster.examples.sprites.training.train_vae import write_vae
from conceptmaster.examples.stickers.training import train
from conceptmaster.examples.stickers.training.components import doubled
from conceptmaster.examples.stickers.training.packing import HEADS, pack_folder, save
from conceptmaster.examples.stickers.training.trainee import Trainee
from conceptmaster.examples.stickers.world.tokens import build_tokenizer

from ..small import atlas, small_config

SMALL = """
import os, signal, sys

ABSENT = {"av", "cuda", "diffusers", "ftfy", "matplotlib", "ml_dtypes", "onnx", "onnxruntime", "onnxscript"}
ABSENT |= {"hypothesis", "peft", "resvg_py", "tensorrt", "tensorrt_rtx", "tritonclient"}
for name in ABSENT:
    sys.modules[name] = None
from conceptmaster.examples.stickers import cli
from conceptmaster.examples.stickers.training import options, train
from conceptmaster.examples.stickers.world import grounds
from tests.examples.stickers.small import small_config

train.preset, train.PROBED, grounds.EACH = lambda name: small_config(), 4, 2
options.Supply.__init__.__defaults__ = 2, 4, 1
killed, of = int(sys.argv[1]), train.Drawn.of


def drawn(*asked):
    if asked[5] == killed:
        os.kill(os.getpid(), signal.SIGKILL)
    return of(*asked)


train.Drawn.of = drawn
sys.exit(cli.main(["train", *sys.argv[2:]]))
"""


def checkpoint(folder: Path) -> Path:
    """A packed one of untrained weights."""
    torch.manual_seed(0)
    config = small_config()
    training = folder / "training"
    training.mkdir()
    build_tokenizer(atlas(), captions=100).save(str(training / "tokenizer.json"))
    write_vae(doubled(config.vae, train.SPRITES / "vae.safetensors"), training, config.vae)
    trainee = Trainee(config)
    train.save_model(trainee.model, training / "model.safetensors")
    save(training / HEADS, trainee.heads)
    pack_folder(training, folder / "checkpoint")
    return folder / "checkpoint"


@pytest.mark.slow
def test_it_needs_an_atlas_and_a_checkpoint_and_goes_on_exactly_after_a_kill(tmp_path):
    atlas().save(tmp_path / "atlas.npz")
    start = checkpoint(tmp_path)

    def run(folder: str, killed: int, *more: str) -> int:
        """Its exit code."""
        given = ["--atlas", "atlas.npz", "--output", folder, "--device", "cpu", "--threads", "1"]
        given += ["--batch-size", "4", "--captions", "4", "--log-every", "1", "--steps", "7", *more]
        paths = [str(Path(__file__).parents[4]), *sys.path]
        code = f"import sys\nsys.path[:] = {paths!r}\n{SMALL}"
        done = subprocess.run(
            [sys.executable, "-c", code, str(killed), *given], cwd=tmp_path, capture_output=True, text=True
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode

    begin = ("--start", str(start))
    assert run("whole", -1, *begin) == 0
    assert run("parts", 6, *begin) == -9
    kept = {path.name: path.stat().st_size for path in (tmp_path / "parts" / "packed").iterdir()}
    assert {"weights-1.safetensors", "vae.safetensors", "vae.json", "tokenizer.json"} == kept.keys()
    assert max(kept.values()) <= 16 * 2**20
    assert run("parts", -1, *begin) == 0
    whole, parts = (load(tmp_path / name / "model.safetensors")[0] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert run("further", -1, "--start", "parts/packed", "--steps", "1") == 0
