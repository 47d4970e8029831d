"""Several processes make one request: real ones, that torchrun or a pipeline has started, over gloo."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("diffusers")
pytest.importorskip("onnxscript")

from conceptmaster import InputError, Pipeline, RanksLost, Request  # noqa: E402
from conceptmaster.engine.checkpoints.safetensors_io import save, save_model  # noqa: E402
from conceptmaster.engine.checkpoints.source import random_source  # noqa: E402
from conceptmaster.engine.presets import preset  # noqa: E402
from conceptmaster.export.bundle import write_bundle  # noqa: E402
from conceptmaster.kernels.tolerances import RELATIVE_L2  # noqa: E402
from conceptmaster.runtime.backends.pytorch import leader  # noqa: E402
from conceptmaster.runtime.workers.interface import FRAMES, Task, WorkerLost  # noqa: E402
from conceptmaster.runtime.workers.process import ProcessWorker  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from rank_script import latents_of  # noqa: E402

SCRIPT = Path(__file__).with_name("rank_script.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
GRIDS = {"injection": "none", "given": "grids", "max_concepts": 3, "side": 64, "guidance_rule": "projected"}
GRIDS |= {"text_tokens": 160}
BASE = {"in_channels": 12, "image_dim": 16, "added_kv_proj_dim": 48, "picture_tokens": 5, "injection": "base"}
MODELS = {
    "standalone": {},
    "shared_query": {"injection": "shared_query"},
    "boxes": {"mask": "boxes"},
    "merged": {"injection": "merged"},
    "none": {"injection": "none", "prediction": "sample"},
    "control": {
        "injection": "none",
        "given": "control",
        "max_concepts": 2,
        "num_layers": 4,
        "vace_layers": (0, 2),
        "vace_in_channels": 2 * 4 + 8 * 8,
    },
    "behind": {"injection": "none", "given": "behind", "max_concepts": 2},
    "clean": {"injection": "none", "given": "clean", "max_concepts": 1},
    "grids": GRIDS,
    "first": BASE | {"given": "first", "max_concepts": 1},
    "experts": {"injection": "none", "boundary": 0.7},
    "one_branch": {"injection": "standalone"},
}
BRANCHES = {"grids": 3, "one_branch": 1, "merged": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """`model("merged")`: the folder of a tiny bundle of four heads with its weights, without graphs."""
    folder, made = tmp_path_factory.mktemp("ranks"), {}

    def build(name):
        if name not in made:
            config, changes = preset("tiny"), dict(MODELS[name])
            own = {"num_attention_heads": 4, "position_channels": 0} | changes
            parts = {}
            for part in ("transformer", "concept"):
                known = {f.name for f in dataclasses.fields(getattr(config, part))} & own.keys()
                parts[part] = dataclasses.replace(getattr(config, part), **{k: own.pop(k) for k in known})
            config = dataclasses.replace(config, frames=9, height=48, width=32, **parts, **own)
            source = random_source(config)
            write_bundle(source, folder / name, branches=BRANCHES.get(name, 2), with_graphs=False)
            (folder / name / "weights").mkdir()
            save_model(source.model, folder / name / "weights" / "model.safetensors")
            save(folder / name / "weights" / "vae.safetensors", source.vae.state_dict())
            made[name] = folder / name
        return made[name]

    return build


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """`picture(0)`: a file of random colours."""
    from PIL import Image

    def draw(number):
        path = tmp_path_factory.mktemp("pictures") / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48)).save(path)
        return str(path)

    return draw


def torchrun(ranks, *arguments, **more):
    """What torchrun's command makes of a program, over so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.run(
        [*command, str(ranks), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=300,
        **more,
    )


def job(model, picture, name, **more):
    """One of rank_script.py's: two samples in three steps."""
    count = {"none": 0, "experts": 0, "first": 1, "clean": 1}.get(name, 2)
    labels = ["ball", "cat"][:count]
    guidance = {} if BRANCHES.get(name) == 1 else {"guidance": 3.0}
    request = {"prompt": "a ball and a cat", "steps": 3, "seed": 4, "samples": 2} | guidance
    if name == "boxes":
        request["boxes"] = {
            "ball": (0.0, 0.0, 0.5, 1.0),
            "cat": {0: (0.5, 0.0, 1.0, 0.5), 8: (0.5, 0.5, 1, 1)},
        }
    concepts = [[label, picture(number)] for number, label in enumerate(labels)]
    return {"bundle": str(model(name)), "request": request, "concepts": concepts, **more}


def made_over(ranks, jobs, tmp_path):
    """The latents of each job, made over so many ranks in one run of torchrun."""
    for number, one in enumerate(jobs):
        one["save"] = str(tmp_path / f"{number}.npy")
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = torchrun(ranks, SCRIPT, tmp_path / "jobs.json")
    assert done.returncode == 0, done.stderr
    return [np.load(one["save"]) for one in jobs]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_model_over_ranks_is_what_one_process_makes(model, picture, ranks, tmp_path, assert_close):
    """Latents, by the table's row of float32; measured: 8e-7 of the largest at most."""
    jobs = [job(model, picture, name) for name in MODELS]
    jobs += [
        job(model, picture, "standalone", options=options)
        for options in ({"skip_guidance": 0.5}, {"step_cache": 0.2}, {"tier": "high"})
    ]
    for one, found in zip(jobs, made_over(ranks, jobs, tmp_path), strict=True):
        expected = latents_of(one, 1)
        assert len(np.unique(expected[0] - expected[1])) > 10  # two samples, and neither is nothing
        if one.get("options") == {"tier": "high"}:  # what rounds to 8 bits rounds otherwise now and then
            assert np.linalg.norm(found - expected) < RELATIVE_L2["linear8"] * np.linalg.norm(expected)
        else:
            scale = np.abs(expected).max()
            assert_close(found / scale, expected / scale)


def test_torchrun_makes_a_batch(model, picture, tmp_path):
    """The command, over two ranks that part the tokens."""
    bundle, image = model("one_branch"), picture(0)
    lines = [
        {"prompt": "a ball", "concepts": [{"label": "ball", "image": image}], "seed": seed, "steps": 2}
        for seed in (1, 2)
    ]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    asked = ("generate", "--backend", "torch", "--bundle", bundle, "--threads", 1, "--quiet", "--json")
    asked += ("--requests", tmp_path / "requests.jsonl", "--output", "{name}.npy")
    done = torchrun(2, "-m", "conceptmaster", *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["made"] == 2 and done.stdout.count("\n") == 1
    with Pipeline.from_bundle(bundle, backend="torch", threads=1) as pipeline:
        for name, line in enumerate(lines, 1):
            (video,) = pipeline.generate(Request.from_data(line, tmp_path))
            found = np.load(tmp_path / f"{name}.npy")
            assert np.abs(video.frames.astype(int) - found).max() <= 1 and found.std() > 1


@pytest.fixture
def others():
    """Processes that this one has started for other tests, as Python's own resource tracker."""
    return set(children(os.getpid()))


def test_a_killed_rank_is_told_of(model, others):
    """And all of it is gone; a pipeline that is opened anew works."""
    pipeline = Pipeline.from_bundle(model("one_branch"), backend="torch", threads=1, gpus=2)
    (follower,) = set(children(os.getpid())) - others
    request = Request("a ball", steps=4, seed=1)

    def kill(step, steps, preview):
        if step == 2:
            os.kill(follower, signal.SIGKILL)

    with pytest.raises(RanksLost, match=r"^the process of rank 1 has ended \(signal 9\)$"):
        pipeline.generate(request, callback=kill)
    with pytest.raises(RanksLost, match="open the bundle again"):
        pipeline.generate(request)
    pipeline.close()
    assert set(children(os.getpid())) <= others


def test_ranks_of_another_bundle_are_refused(model, others, monkeypatch):
    own = leader.fingerprint
    monkeypatch.setattr(leader, "fingerprint", lambda bundle: own(bundle) | {"manifest": "0" * 64})
    with pytest.raises(
        RanksLost, match=r"^rank 1: it has the bundle '.*' with the manifest \w+, rank 0 has 0+$"
    ):
        Pipeline.from_bundle(model("one_branch"), backend="torch", threads=1, gpus=2)
    assert set(children(os.getpid())) <= others


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"gpus": 3}, r"^3 GPUs cannot share 1 guidance branch and 4 heads: take 1, 2 or 4 of them$"),
        ({"gpus": 1000}, r"take 1, 2 or 4 of them$"),
        ({"gpus": 0}, "^gpus must be a number of GPUs, 1 or more, not 0$"),
        ({"gpus": 2, "backend": "onnxruntime"}, "^one request on several GPUs is for the backend torch"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_started(model, others, how, reason):
    with pytest.raises(InputError, match=reason):
        Pipeline.from_bundle(model("one_branch"), **{"backend": "torch"} | how)
    assert set(children(os.getpid())) <= others


def children(pid):
    """The processes that `pid` has started and that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                _, _, rest = (entry / "stat").read_text().rpartition(") ")
                state, parent = rest.split()[:2]
                found += [int(entry.name)] if int(parent) == pid and state != "Z" else []
    return found


def wait_until(true, seconds=60.0):
    """Fails where it does not become true."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


LEADER = """
import sys
from conceptmaster import Pipeline, Request
with Pipeline.from_bundle(sys.argv[1], backend="torch", threads=1, gpus=2) as pipeline:
    print("open", flush=True)
    request = Request("a ball", steps=1000, seed=1)
    pipeline.generate(request, callback=lambda n, *_: print("step", flush=True) if n == 3 else None)
"""


@pytest.fixture
def leading(model):
    """A process that makes a long video over two ranks, once it has begun, and the other rank's number."""
    with subprocess.Popen(
        [sys.executable, "-c", LEADER, str(model("one_branch"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | {"CONCEPTMASTER_RANK_TIMEOUT": "20"},
    ) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["open\n", "step\n"]
        yield process, *children(process.pid)
        process.kill()


@pytest.mark.slow
def test_a_killed_leader_leaves_nobody_behind(leading):
    process, follower = leading
    process.kill()
    wait_until(lambda: not Path(f"/proc/{follower}").exists())


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_so_long(leading):
    process, follower = leading
    os.kill(follower, signal.SIGSTOP)
    assert process.wait(60) == 1
    lines = process.stderr.read().splitlines()
    assert lines == [
        "conceptmaster: error: a rank does not answer for 20 seconds ($CONCEPTMASTER_RANK_TIMEOUT)"
    ]
    wait_until(lambda: not Path(f"/proc/{follower}").exists())


@pytest.mark.slow
def test_wrong_arguments_are_told_once(model, tmp_path):
    done = torchrun(2, "-m", "conceptmaster", "generate", "--prompt", "a ball", "--output", "x.xyz")
    assert done.returncode and done.stderr.count("conceptmaster: error:") == 1
    done = torchrun(
        2, "-m", "conceptmaster", "generate", "--prompt", "a ball", "--output", tmp_path / "x.mp4"
    )
    (line,) = [line for line in done.stderr.splitlines() if "conceptmaster: error:" in line]
    assert done.returncode and line.endswith("not onnxruntime: --backend torch")


@pytest.mark.slow
def test_a_worker_of_several_ranks_is_one_worker(model, tmp_path):
    """As the server has it: it makes what one process makes, is lost with one of its ranks, and takes all of
    them along."""
    folder = model("one_branch")
    options = {"device": "cpu", "backend": "torch", "precision": None, "threads": 2, "verbose": False}
    worker = ProcessWorker("tiny", options | {"gpus": 2, "options": None, "place": str(folder)})
    asked = {"prompt": "a ball", "seed": 5, "steps": 4}

    async def use():
        await worker.start()
        (follower,) = children(worker.pid)
        await worker.make(Task("a", asked, (), tmp_path, frames=True), lambda said: None)

        def kill(said):
            if said.get("step") == 2:
                os.kill(follower, signal.SIGKILL)

        with pytest.raises(WorkerLost, match="exit code 1"):
            await worker.make(Task("b", asked | {"steps": 1000}, (), tmp_path, frames=True), kill)
        await worker.start()  # as the dispatcher does
        process, (follower,) = worker.pid, children(worker.pid)
        os.kill(process, signal.SIGKILL)
        await worker.gone()
        wait_until(lambda: not Path(f"/proc/{follower}").exists())

    asyncio.run(use())
    with Pipeline.from_bundle(folder, backend="torch", threads=1) as pipeline:
        (video,) = pipeline.generate(Request(**asked))
    assert np.abs(np.load(tmp_path / FRAMES.format(0)).astype(int) - video.frames).max() <= 1
