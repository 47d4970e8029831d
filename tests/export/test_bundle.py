"""Whole bundles: made, run by the runtime against plain PyTorch, verified, and all the ways it goes wrong."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from conceptmaster.errors import ExportError, InputError

torch = pytest.importorskip("torch")


@pytest.fixture
def own(bundle, tmp_path):
    """A copy of the bundle, to be changed."""
    return shutil.copytree(bundle, tmp_path / "own")


@pytest.fixture(scope="module")
def weights(tiny, tmp_path_factory):
    """A source folder with the weights of `tiny`. Not to be changed."""
    from conceptmaster.engine.checkpoints.safetensors_io import save, save_model

    folder = tmp_path_factory.mktemp("weights")
    save_model(tiny.model, folder / "model.safetensors")
    save(folder / "vae.safetensors", tiny.vae.state_dict())
    (folder / "tokenizer.json").write_text(tiny.tokenizer)
    return folder


@pytest.fixture
def own_weights(weights, tmp_path):
    return shutil.copytree(weights, tmp_path / "weights")


@pytest.fixture
def no_export(monkeypatch):
    """Lets `write_bundle` get as far as exporting, and no further."""
    from conceptmaster.export import bundle as bundles

    class Reached(Exception):
        pass

    def stop(spec, path, *show):
        raise Reached

    monkeypatch.setattr(bundles, "export_graph", stop)
    return Reached


def fails(result, code, *words):
    """One line on standard error, nothing on standard output."""
    found, out, err = result
    assert (found, out) == (code, "")
    assert err.startswith("conceptmaster: error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


# The runtime on the bundle, against PyTorch.

STEPS, SHIFT, GUIDANCE, SEED = 6, 3.0, 2.5, 7
CAPTION, LABELS = "a ball rolls", ["ball", "cat"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def plain_torch(source, solver, pictures):
    """The whole of a request by hand: one branch at a time, no padding, diffusers' scheduler and VAE."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
    from tokenizers import Tokenizer

    from conceptmaster.engine.vae.wan_decoder import decode

    model, config = source.model, source.model.config
    tokenizer = Tokenizer.from_str(source.tokenizer)

    def tokens(text, size):
        ids = tokenizer.encode(text).ids
        padded = torch.tensor(ids + [0] * (size - len(ids)))
        return padded, torch.arange(size) < len(ids)

    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    else:
        scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
        )
    scheduler.set_timesteps(STEPS)

    labels, masks = zip(*(tokens(label, config.concept.label_tokens) for label in LABELS), strict=True)
    pixels = torch.stack([(torch.from_numpy(p) / 255 - MEAN) / STD for p in pictures]).permute(0, 3, 1, 2)
    noise = np.random.Generator(np.random.Philox(SEED)).standard_normal(config.latent_shape, np.float32)
    x = torch.from_numpy(noise)[None]
    with torch.inference_mode():
        for t in scheduler.timesteps:
            velocities = []
            for text, present in (("", False), (CAPTION, True)):
                ids, mask = tokens(text, config.text_tokens)
                velocities.append(
                    model.velocity(
                        x,
                        t[None].float(),
                        ids[None],
                        mask[None],
                        pixels[None],
                        torch.stack(labels)[None],
                        torch.stack(masks)[None],
                        torch.full((1, len(LABELS)), present),
                    )
                )
            velocity = velocities[0] + GUIDANCE * (velocities[1] - velocities[0])
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
        video = decode(source.vae, x)[0]  # [3,frames,height,width]
    return ((video + 1) / 2 * 255).permute(1, 2, 3, 0).numpy()


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_the_runtime_gives_what_plain_torch_gives(bundle, tiny, solver):
    from conceptmaster import Concept, Pipeline

    size = tiny.model.config.concept.picture_size
    pictures = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    video = Pipeline.from_bundle(bundle, threads=1)(
        CAPTION,
        [Concept(label, picture) for label, picture in zip(LABELS, pictures, strict=True)],
        seed=SEED,
        steps=STEPS,
        guidance=GUIDANCE,
        solver=solver,
        shift=SHIFT,
    )
    expected = plain_torch(tiny, solver, pictures)
    assert video.frames.shape == expected.shape and video.frames.std() > 5
    assert abs(video.frames - expected).max() <= 1.0


def test_concepts_and_captions_show_in_the_video(bundle, tiny):
    from conceptmaster import Concept, Pipeline

    pipeline = Pipeline.from_bundle(bundle, threads=1)
    picture = np.full((16, 16, 3), 200, np.uint8)
    videos = [
        pipeline("a", [Concept("ball", picture)], steps=2),
        pipeline("a", [Concept("cat", picture)], steps=2),
        pipeline("a", [Concept("ball", picture // 4)], steps=2),
        pipeline("b", [Concept("ball", picture)], steps=2),
        pipeline("a", [], steps=2),
    ]
    frames = [video.frames.tobytes() for video in videos]
    assert len(set(frames)) == len(frames)


# What is in a bundle.


def test_manifest(bundle, tiny):
    from conceptmaster import __version__
    from conceptmaster.runtime.bundle_format.manifest import load

    manifest, config = load(bundle), tiny.model.config
    assert manifest.model == config.to_dict()
    assert (manifest.name, manifest.precision, manifest.fps) == ("tiny", "fp32", config.fps)
    assert manifest.shapes.latent == config.latent_shape and manifest.shapes.branches == 2
    assert manifest.written_by["conceptmaster"] == __version__
    assert manifest.written_by["torch"].startswith(torch.__version__.split("+")[0])
    assert sorted(path.name for path in bundle.iterdir()) == sorted(
        ["manifest.json", "tokenizer.json", *(graph.file for graph in manifest.graphs.values())]
    )


@pytest.fixture
def exported_before(bundle, monkeypatch):
    """Where the graph is one of `bundle`, exporting takes its file, which saves the time."""
    from conceptmaster.export import bundle as bundles
    from conceptmaster.export.onnx_graphs.trace import describe, export_graph

    def export(spec, path, *show):
        shutil.copy(bundle / path.name, path)
        try:
            return describe(path, spec)
        except ExportError:  # other shapes
            return export_graph(spec, path, *show)

    monkeypatch.setattr(bundles, "export_graph", export)


def test_what_a_folder_of_weights_tells_of_its_model(own_weights, tmp_path, command):
    from conceptmaster.runtime.bundle_format.manifest import load

    words = {"words": ["a"], "labels": ["ball", "cat"], "phrases": {"motions": ["rolls left"]}}
    (own_weights / "vocabulary.json").write_text(json.dumps(words))
    (own_weights / "ranges.json").write_text('{"steps": [2, 9]}')
    assert command("export", own_weights, "--output", tmp_path / "new", "--no-graphs")[0] == 0
    told = load(tmp_path / "new")
    assert told.vocabulary.labels == ("ball", "cat") and told.vocabulary.phrases["motions"] == ("rolls left",)
    assert told.ranges.steps == (2, 9) and told.ranges.guidance is None
    assert {"vocabulary.json", "ranges.json"} <= {file.file for file in told.source.files}
    (own_weights / "vocabulary.json").write_text('{"open": true}')
    assert command("export", own_weights, "--output", tmp_path / "open", "--no-graphs")[0] == 0
    assert load(tmp_path / "open").vocabulary.open
    for name, wrong, word in (
        ("vocabulary", '{"words": "a"}', "vocabulary.json.words must be a list"),
        ("vocabulary", '{"nouns": ["ball"]}', "unknown key 'nouns'"),
        ("vocabulary", "{}", "words and labels must be there, unless open"),
        ("vocabulary", "[]", "vocabulary.json is not a JSON object"),
        ("ranges", '{"steps": [9, 2]}', "ranges.json: steps must be smallest, largest"),
    ):
        (own_weights / f"{name}.json").write_text(wrong)
        fails(command("export", own_weights, "--output", tmp_path / "bad", "--no-graphs"), 2, word)
        (own_weights / f"{name}.json").unlink()


def test_int8_bundle_from_a_folder_of_weights(
    bundle, weights, own_weights, tmp_path, command, exported_before
):
    (own_weights / "defaults.json").write_text('{"solver": "euler", "steps": 3, "negative": "bad"}')
    code, out, _ = command("export", own_weights, "--output", tmp_path / "new", "--int8", "--json")
    assert code == 0
    rows = {row["graph"]: row for row in json.loads(out)["graphs"]}
    assert rows["denoise"]["precision"] == "int8" and rows["condition"]["precision"] == "fp32"
    assert all(row["ok"] for row in rows.values())

    from conceptmaster import Pipeline
    from conceptmaster.runtime.bundle_format.manifest import load

    manifest = load(tmp_path / "new")
    assert (
        manifest.precision == "int8" and manifest.defaults.solver == "euler" and manifest.defaults.steps == 3
    )
    fp32 = load(bundle)
    assert manifest.graphs["denoise"].sha256 != fp32.graphs["denoise"].sha256
    assert manifest.graphs["condition"] == fp32.graphs["condition"]

    video = Pipeline.from_bundle(tmp_path / "new", threads=1)("a")
    reference = Pipeline.from_bundle(bundle, threads=1)("a", solver="euler", steps=3, negative="bad")
    assert 0 < abs(video.frames.astype(int) - reference.frames).max() < 40

    code, out, _ = command("verify", tmp_path / "new", "--source", weights)
    assert code == 0 and out.count(" ok\n") == 8


def test_without_a_second_branch_nothing_is_guided(tiny, tmp_path, exported_before):
    from conceptmaster import Pipeline
    from conceptmaster.export.bundle import write_bundle

    write_bundle(tiny, tmp_path / "new", branches=1)
    pipeline = Pipeline.from_bundle(tmp_path / "new", threads=1)
    assert pipeline.manifest.defaults.guidance == 1.0
    assert pipeline("a", steps=1).frames.shape == (5, 32, 32, 3)


# verify


def change_a_weight(folder, graph, rehash):
    import hashlib

    import onnx
    from onnx import numpy_helper

    from conceptmaster.runtime.bundle_format import strict_json

    path = folder / f"{graph}.onnx"
    model = onnx.load(str(path))
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] += 1.0
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save_model(model, str(path))
    if rehash:
        data = json.loads((folder / "manifest.json").read_text())
        del data["checksum"]
        data["graphs"][graph]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        data["checksum"] = hashlib.sha256(strict_json.canonical(data)).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(data))


def test_verify_finds_another_weight(own, command):
    change_a_weight(own, "denoise", rehash=True)
    code, out, err = command("verify", own, "--source", "preset:tiny", "--json")
    rows = {row["graph"]: row["ok"] for row in json.loads(out)["graphs"]}
    assert (code, err) == (1, "") and [name for name in rows if not rows[name]] == ["denoise"]


def test_verify_finds_a_changed_file(own, command):
    change_a_weight(own, "dam", rehash=False)
    fails(command("verify", own, "--source", "preset:tiny"), 1, "dam.onnx", "SHA-256")


def test_verify_wants_to_know_the_weights(own, command, tmp_path):
    fails(command("verify", own), 2, "--source")
    fails(command("verify", own, "--source", "preset:sprites"), 2, "another model")
    fails(command("verify", tmp_path / "nothing"), 2, "no bundle")


@pytest.mark.parametrize(
    ("found", "expected", "error"),
    [
        ([[1.0, 2.0], [0.0, 0.0]], [[1.0, 2.0], [0.0, 0.0]], 0.0),
        ([[1.0, 2.0], [0.1, 0.0]], [[1.0, 4.0], [0.1, 0.0]], 0.5),
        ([[100.0], [0.2]], [[100.0], [0.1]], 1.0),  # the small slice counts by itself
        ([[1.0], [1e-9]], [[1.0], [0.0]], np.inf),
        ([[np.nan]], [[1.0]], np.nan),
        ([[1.0]], [[1.0, 1.0]], np.inf),
    ],
)
def test_relative_error(found, expected, error):
    from conceptmaster.export.verify import relative_error

    assert relative_error(np.array(found), np.array(expected)) == pytest.approx(error, nan_ok=True)


def test_a_row_that_is_not_a_number_is_not_ok():
    from conceptmaster.export.verify import Row

    assert not Row("dam", "fp32", np.nan, np.nan, 1e-5, 0.1).ok


# All or nothing.


def test_a_graph_too_far_off_stops_the_export(tiny, tmp_path, monkeypatch, exported_before):
    from conceptmaster.export import bundle as bundles
    from conceptmaster.export import verify

    monkeypatch.setitem(verify.TOLERANCES, "fp32", 0.0)
    with pytest.raises(ExportError, match="text_encoder.*off by") as caught:
        bundles.write_bundle(tiny, tmp_path / "new")
    assert caught.value.exit_code == 1 and list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(tiny, tmp_path, monkeypatch):
    from conceptmaster.export import bundle as bundles

    def interrupt(spec, path, *show):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(bundles, "export_graph", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bundles.write_bundle(tiny, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_overwrite_leaves_what_was_there(own, tiny, monkeypatch, no_export):
    from conceptmaster.export import bundle as bundles
    from conceptmaster.runtime.bundle_format.manifest import load

    with pytest.raises(no_export):
        bundles.write_bundle(tiny, own, overwrite=True)
    load(own)
    assert [path.name for path in own.parent.iterdir()] == ["own"]


@pytest.fixture
def copied(bundle, monkeypatch):
    """Exporting takes the files of `bundle`."""
    from conceptmaster.export import bundle as bundles
    from conceptmaster.runtime.bundle_format.manifest import load

    graphs = load(bundle).graphs

    def export(spec, path, *show):
        shutil.copy(bundle / path.name, path)
        return graphs[spec.name]

    monkeypatch.setattr(bundles, "export_graph", export)
    monkeypatch.setattr(bundles, "check", lambda spec, *more: bundles.Row(spec.name, "", 0.0, 0.0, 1.0, 1.0))


def test_overwriting_removes_what_was_listed_and_nothing_else(own, tiny, tmp_path, copied):
    from conceptmaster.export import bundle as bundles
    from conceptmaster.export.tensorrt_engines.build import vouch
    from conceptmaster.runtime.bundle_format import tensorrt_engines as stored
    from conceptmaster.runtime.bundle_format.find import Bundle

    engines = stored.Engines(stored.FORMAT, "tensorrt", "11.4.0", 90, "bf16", 0, {})
    place = own / stored.FOLDER / engines.folder_name
    (place / "graphs").mkdir(parents=True)
    for name in ("timing.cache", "build.sh", "graphs/dam.onnx", "graphs/dam.onnx.data"):
        (place / name).touch()
    opened = Bundle.open(own)
    for name in opened.manifest.graphs:
        (place / f"{name}.engine").write_text("engine")
    vouch(place, engines, opened)
    killed = own / stored.FOLDER / f".{engines.folder_name}.part"
    (killed / "half.new").mkdir(parents=True)
    (killed / "half.new" / "dam.engine").write_text("half of it")
    (own / "dam.onnx").write_text("damaged: to write it again is the repair")
    for name in ("weights/model.safetensors", f"{place.relative_to(own)}/note", ".hidden"):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).touch()
        with pytest.raises(InputError, match=f"would be lost: '{name}'; move it away"):
            bundles.write_bundle(tiny, own, overwrite=True)
        (own / name).unlink()
    bundles.write_bundle(tiny, own, overwrite=True)
    Bundle.open(own)
    assert not (own / "engines").exists() and [path.name for path in tmp_path.iterdir()] == ["own"]


def test_a_folder_that_appears_meanwhile_stays(tiny, tmp_path, copied, monkeypatch):
    from conceptmaster.export import bundle as bundles

    def save(manifest, folder):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "thesis.txt").write_text("a year of work")

    monkeypatch.setattr(bundles.manifests, "save", save)
    for overwrite in (False, True):
        with pytest.raises(InputError, match="new' is not empty and not a bundle: choose another place"):
            bundles.write_bundle(tiny, tmp_path / "new", overwrite=overwrite)
        assert [path.name for path in tmp_path.iterdir()] == ["new"]
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["thesis.txt"]
        shutil.rmtree(tmp_path / "new")


# What the caller did wrong.


def test_where_a_bundle_cannot_go(own, tmp_path, command, no_export):
    fails(command("export", "preset:tiny", "--output", own), 2, "--overwrite")
    fails(command("export", "preset:tiny", "--output", tmp_path / "a" / "b"), 2, "does not exist")
    fails(command("export", "preset:tiny", "--output", own / "dam.onnx", "--overwrite"), 2, "no folder")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    fails(command("export", "preset:tiny", "--output", tmp_path / "full", "--overwrite"), 2, "not a bundle")
    (tmp_path / "full" / "manifest.json").write_text('{"name": "my web app"}')
    (tmp_path / "full" / "engines" / ".x.part" / "mine.new").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    result = command("export", "preset:tiny", "--output", tmp_path / "full", "--overwrite")
    fails(result, 2, "not a bundle that can be replaced", "lacks the key 'format'")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_source_cannot_be(own_weights, tmp_path, command):
    output = ("--output", tmp_path / "new")
    fails(command("export", tmp_path / "nothing", *output), 2, "nothing")
    fails(command("export", "preset:huge", *output), 2, "huge", "tiny")
    fails(command("export", "preset:tiny", *output, "--branches", 4), 2, "--branches")
    for name, word in (
        ("model.safetensors", "has no transformer"),  # what has no such file is looked at as a base
        ("vae.safetensors", "lacks vae.safetensors"),
        ("tokenizer.json", "lacks tokenizer.json"),
    ):
        (own_weights / name).rename(tmp_path / "aside")
        fails(command("export", own_weights, *output), 2, word)
        (tmp_path / "aside").rename(own_weights / name)
    for name, content, word in (
        ("defaults.json", "{", "JSON"),
        ("defaults.json", '{"step": 3}', "steps"),
        ("defaults.json", '{"solver": "magic"}', "magic"),
        ("defaults.json", '{"steps": "many"}', "defaults.json"),
        ("defaults.json", '{"concept_guidance": 2}', "--branches 3"),
        ("tokenizer.json", "{}", "no tokenizer that is read"),
        ("vae.safetensors", "nonsense", "safetensors"),
        ("model.safetensors", "nonsense", "safetensors"),
    ):
        kept = (own_weights / name).read_bytes() if (own_weights / name).exists() else None
        (own_weights / name).write_text(content)
        fails(command("export", own_weights, *output), 2, word)
        (own_weights / name).unlink() if kept is None else (own_weights / name).write_bytes(kept)
    assert not (tmp_path / "new").exists()


def test_weights_of_another_vae_do_not_fit(own_weights, tiny, tmp_path, command):
    from conceptmaster.engine.checkpoints.safetensors_io import save

    state = dict(tiny.vae.state_dict())
    state.pop("quant_conv.bias")
    save(own_weights / "vae.safetensors", state)
    result = command("export", own_weights, "--output", tmp_path / "new")
    fails(result, 2, "quant_conv.bias", "missing")


@pytest.mark.parametrize(
    ("vocabulary", "end", "word"), [(600, True, "600 entries"), (300, False, "must end every text")]
)
def test_tokenizers_that_do_not_fit(own_weights, tmp_path, command, vocabulary, end, word):
    from tokenizers import Tokenizer, models, processors

    words = {"<pad>": 0, "</s>": 1, "a": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    if end:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    tokenizer.save(str(own_weights / "tokenizer.json"))
    fails(command("export", own_weights, "--output", tmp_path / "new"), 2, word)


def test_the_tokenizer_of_bytes_reads_everything():
    from tokenizers import Tokenizer

    from conceptmaster.engine.checkpoints.source import byte_tokenizer

    tokenizer = Tokenizer.from_str(byte_tokenizer(258))
    for text in ("a ball", "Ünïcödé 🎈", ""):
        ids = tokenizer.encode(text).ids
        assert ids[-1] == 1 and len(ids) == len(text.encode()) + 1 and min([2, *ids[:-1]]) >= 2
        assert tokenizer.decode(ids) == text
