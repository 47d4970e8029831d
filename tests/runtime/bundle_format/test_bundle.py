"""A bundle is taken whole and unchanged, or refused in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conceptmaster import Pipeline
from conceptmaster.errors import BundleError, InputError
from conceptmaster.hashed import sha256_file
from conceptmaster.runtime.backends import open_backend
from conceptmaster.runtime.bundle_format import find as bundles
from conceptmaster.runtime.bundle_format import manifest
from conceptmaster.runtime.bundle_format.find import Bundle

Edit = Callable[[Path, Callable[[dict], object]], None]
CONCEPTS = ("image_encoder", "qformer", "dam")


@pytest.fixture
def own(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the fake bundle that a test may change."""
    return Path(shutil.copytree(bundle, tmp_path / "own"))


def refused(folder: Path, word: str) -> None:
    with pytest.raises(BundleError, match=word) as caught:
        Bundle.open(folder)
    assert "\n" not in str(caught.value)


def test_opens_and_survives_a_round_trip(own: Path) -> None:
    opened = Bundle.open(own)
    (own / "manifest.json").unlink()
    manifest.save(opened.manifest, own)
    assert Bundle.open(str(own)).manifest == opened.manifest
    assert opened.tokenizer.is_file()
    with opened.reading("denoise") as path:
        assert path == own / "denoise.onnx"
    assert not [path for path in own.iterdir() if path.name.startswith(".")], "a temporary file was left"


def test_one_changed_bit_anywhere_is_found(bundle: Path, own: Path) -> None:
    files = sorted(path.name for path in own.iterdir())
    assert len(files) == 10
    for name in files:
        data = bytearray((bundle / name).read_bytes())
        for place in (0, len(data) // 2, len(data) - 2):
            changed = data.copy()
            changed[place] ^= 1
            (own / name).write_bytes(changed)
            refused(own, name)
        (own / name).write_bytes(data)
    Bundle.open(own)


def test_every_bit_of_the_manifest_counts(own: Path) -> None:
    path = own / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"shift": 3.0', '"shift": 4.0'))
    refused(own, "its own checksum")


@pytest.mark.parametrize("name", ["decode.onnx", "tokenizer.json"])
def test_missing_and_truncated_files(own: Path, name: str) -> None:
    data = (own / name).read_bytes()
    (own / name).write_bytes(data[:-1])
    refused(own, f"{name}.*SHA-256.*expected.*conceptmaster export")
    (own / name).unlink()
    refused(own, f"{name}.*is missing")
    (own / name).mkdir()
    refused(own, f"{name}.*is missing")


def _third(data: dict, **entries: object) -> None:
    """Makes a manifest one of format 3, with these entries."""
    data.update({"format": 3, "source": {"name": "weights", "files": []}} | entries)


def _experts(*boundaries: float) -> list[dict[str, object]]:
    names = ("transformer", "transformer_2")
    return [{"name": name, "boundary": at} for name, at in zip(names, boundaries, strict=True)]


CHANGES: list[tuple[str, Callable[[dict], object], str]] = [
    ("newer format", lambda d: d.update(format=8, more=1), "has format 8.*upgrade"),
    ("older format", lambda d: d.update(format=0), "format must be 1, 2, 3"),
    ("format is text", lambda d: d.update(format="1"), "manifest.format must be an integer"),
    ("unknown key", lambda d: d.update(more=1), "unknown key 'more'"),
    (
        "unknown key below",
        lambda d: d["shapes"].update(depth=1),
        "manifest.shapes has an unknown key 'depth'",
    ),
    ("missing key", lambda d: d.pop("fps"), "lacks the key 'fps'"),
    ("missing key below", lambda d: d["graphs"]["dam"].pop("sha256"), "graphs.dam lacks the key 'sha256'"),
    (
        "true is no integer",
        lambda d: d["shapes"].update(concepts=True),
        "concepts must be an integer, it is True",
    ),
    ("a number is no integer", lambda d: d["shapes"].update(concepts=3.0), "must be an integer"),
    ("latent of 3", lambda d: d["shapes"].update(latent=[4, 3, 2]), "latent must have 4 entries"),
    ("size 0", lambda d: d["shapes"].update(frames=0), "frames must be 1 to 65536, not 0"),
    ("precision", lambda d: d.update(precision="fp4"), "unknown precision 'fp4'"),
    ("fps", lambda d: d.update(fps=0), "fps must be 0.01 to 1000"),
    ("solver", lambda d: d["defaults"].update(solver="magic"), "unknown solver 'magic'"),
    ("default scale", lambda d: d["defaults"].update(concept_guidance=2.0), "needs 3 guidance branches"),
    ("states", lambda d: d["shapes"].update(solver_states=5), "4 solver states are known, not 5"),
    ("std 0", lambda d: d["pictures"].update(std=[0, 1, 1]), "std must be positive"),
    ("no hash", lambda d: d["tokenizer"].update(sha256="beef"), "not a SHA-256"),
    ("dtype", lambda d: d["graphs"]["dam"]["inputs"][0].update(dtype="float8"), "unknown dtype"),
    ("free shape", lambda d: d["graphs"]["dam"]["inputs"][0].update(shape=[-1, 2, 7]), "is not fixed"),
    ("named axis", lambda d: d["graphs"]["dam"]["inputs"][0].update(shape=["n", 2, 7]), "must be an integer"),
    ("no graph", lambda d: d["graphs"].pop("dam"), "the graphs must be"),
    ("base", lambda d: [d["graphs"].pop(g) for g in CONCEPTS], "condition wants 'concept_tokens', which"),
    ("half a base", lambda d: [d["graphs"].pop(g) for g in CONCEPTS[:2]], "the graphs must be"),
    ("one graph too many", lambda d: d["graphs"].update(more=d["graphs"]["dam"]), "the graphs must be"),
    (
        "wrong shape",
        lambda d: d["shapes"].update(text_tokens=13),
        r"wants 'token_ids' as int64 \[1, 12\], it gets",
    ),
    (
        "lost output",
        lambda d: d["graphs"]["denoise"]["outputs"][0].update(name="x"),
        "must give 'next_state'",
    ),
    (
        "orphan",
        lambda d: d["graphs"]["denoise"]["inputs"][2].update(name="x"),
        "wants 'x', which nothing gives",
    ),
    ("source in format 1", lambda d: d.update(source={"name": "w", "files": []}), "format 1 does not have"),
    ("a whole text in format 3", lambda d: _third(d, whole_text=20), "of format 4"),
    ("a whole text that is none", lambda d: _third(d, format=4, whole_text=12), "more than text_tokens"),
    ("a whole text, no bias", lambda d: _third(d, format=4, whole_text=20), "must take 'text_bias'"),
    ("format 3 without a source", lambda d: d.update(format=3), "says what the bundle was made from"),
    ("path as source", lambda d: d.update(format=3, source={"name": "/w", "files": []}), "neither a Hub id"),
    ("a graph without a file", lambda d: d["graphs"]["dam"].update(file="", sha256=""), "all graphs have"),
    (
        "boxes",
        lambda d: _third(d, boxes={"per_concept": 1, "required": True}),
        "boxes need the model.s patch_size",
    ),
    ("experts in format 4", lambda d: _third(d, format=4, experts=_experts(0.9, 0)), "are of format 5"),
    ("experts, one graph", lambda d: _third(d, format=5, experts=_experts(0.9, 0)), "the graphs must be"),
    ("experts the wrong way", lambda d: _third(d, format=5, experts=_experts(0, 0.9)), "above the last's"),
    ("experts, a gap", lambda d: _third(d, format=5, experts=_experts(0.9, 0.1)), "above the last's"),
    ("experts, beyond", lambda d: _third(d, format=5, experts=_experts(1, 0)), "boundary must be 0 to 1"),
    ("one expert", lambda d: _third(d, format=5, experts=_experts(0.9, 0)[:1]), "must be transformer and"),
    (
        "an expert of another name",
        lambda d: _third(d, format=5, experts=[{"name": "a", "boundary": 0.9}]),
        "'a' is no expert's name",
    ),
    ("vocabulary twice", lambda d: _third(d, vocabulary={"words": ["a", "a"], "labels": ["a"]}), "each once"),
    ("vocabulary without words", lambda d: _third(d, vocabulary={"labels": ["a"]}), "unless open"),
    ("words apart", lambda d: _third(d, vocabulary={"open": True, "labels": ["a  b"]}), "single spaces"),
    ("ranges", lambda d: _third(d, ranges={"steps": [4, 2]}), "smallest, largest"),
    ("frames", lambda d: d["shapes"].update(frames=11), "give 9 frames, the video has 11"),
    ("uneven frames", lambda d: d["shapes"].update(frames=10), "do not divide a video of 10 frames"),
    ("height", lambda d: d["shapes"].update(height=9), "do not divide a video of 9 frames, 8×9"),
    ("size", lambda d: d["shapes"].update(height=16, width=16), "must give 'frames'"),
    ("bounds: frames", lambda d: d["shapes"].update(frames=10**9), "frames must be 1 to 65536, not 10{9};"),
    ("bounds: tokens", lambda d: d["shapes"].update(text_tokens=10**10), "text_tokens must be 1 to 65536"),
    ("bounds: concepts", lambda d: d["shapes"].update(concepts=10**9), "concepts must be 1 to 64"),
    ("bounds: pictures", lambda d: d["shapes"].update(concepts=64, picture_size=2**14), "beyond reason"),
    ("bounds: video", lambda d: d["shapes"].update(height=2**14, width=2**14), "beyond reason"),
    ("bounds: latents", lambda d: d["shapes"].update(latent=[4, 10**9, 2, 2]), "not those of such a video"),
    ("bounds: fps", lambda d: d.update(fps=1e300), "fps must be 0.01 to 1000"),
    ("bounds: a number", lambda d: d.update(fps=10**400), "fps must be a number"),
    ("bounds: guidance", lambda d: d["defaults"].update(guidance=1e300), r"guidance: 0 to 1e\+06"),
    ("bounds: text", lambda d: d["defaults"].update(negative="a" * 10**6), "negative: 10000 characters"),
    ("bounds: padding", lambda d: d["pictures"].update(padded_to=10**9), "padded_to must be 1 to 16384"),
    ("bounds: axis", lambda d: d["graphs"]["dam"]["inputs"][0].update(shape=[10**10]), "beyond reason"),
    ("bounds: axes", lambda d: d["graphs"]["dam"]["inputs"][0].update(shape=[1] * 10**5), "than 8 axes"),
    ("bounds: key", lambda d: d.update({"x" * 10**6: 1}), "unknown key 'x{59};"),
    ("bounds: deep", lambda d: d["model"].update(a=nested(200)), "nested too deeply"),
    ("half a character", lambda d: d["model"].update(a="\ud800"), "half of a surrogate pair"),
    ("not text", lambda d: d.update(written_by={"conceptmaster": ["0.1"]}), "must be a string"),
    ("tiny tiles", lambda d: _tiled(d, 10, 2), "tiles that small are too many"),
    ("a picture that fills time", lambda d: _given(d, [(0, 10**9)]), "count must be 1 to 65536"),
    ("pictures in one place", lambda d: _given(d, [(0, 2), (-9, 1), (5, 1)]), "must differ and leave some"),
    ("a picture outside", lambda d: _given(d, [(0, 1), (8, 2), (5, 1)]), "must differ and leave some"),
    ("no frame is left", lambda d: _given(d, [(0, 3), (3, 3), (6, 3)]), "must differ and leave some"),
]


def nested(depth: int) -> list:
    """[[[…]]]"""
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


def _tiled(data: dict, fold: int, side: int) -> None:
    shapes = data["shapes"]
    height, width = (size * 2**fold for size in shapes["latent"][2:])
    shapes.update(latent=[*shapes["latent"][:2], height, width], height=4 * height, width=4 * width)
    data.update(format=2, tile={"size": [side, side], "overlap": [1, 1]})


def _given(data: dict, places: list[tuple[int, int]]) -> None:
    found = [{"first": first, "count": count, "fit": "whole"} for first, count in places]
    data.update(format=2, given={"places": found, "least": 1, "dropped": 0})


@pytest.mark.parametrize(("change", "word"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_a_manifest_that_does_not_hold(own: Path, edit_manifest: Edit, change: Callable, word: str) -> None:
    edit_manifest(own, change)
    refused(own, word)


def test_format_3_keeps_what_it_was_told(own: Path, edit_manifest: Edit) -> None:
    entries = {
        "vocabulary": {"words": ["a", "ball"], "labels": ["ball"]},
        "ranges": {"steps": [8, 50], "guidance": [1, 6]},
    }
    edit_manifest(own, lambda data: _third(data, **entries))  # the keys of the first files of format 3
    found = Bundle.open(own).manifest
    assert found.source is not None and found.source.name == "weights"
    assert found.vocabulary is not None and found.vocabulary.labels == ("ball",)
    assert found.ranges is not None and found.ranges.steps == (8, 50)
    manifest.save(found, own)
    assert Bundle.open(own).manifest == found


@pytest.mark.parametrize(
    "path",
    [
        "../out.onnx",
        "/etc/passwd",
        "a/../../out.onnx",
        "..",
        "",
        ".",
        "C:\\out.onnx",
        "C:out.onnx",
        "..\\out.onnx",
        "\\\\host\\share",
        "a\0b",
    ],
)
@pytest.mark.parametrize("place", ["graph", "external", "tokenizer"])
def test_paths_stay_inside(own: Path, edit_manifest: Edit, path: str, place: str) -> None:
    def change(data: dict) -> None:
        graph, file = data["graphs"]["dam"], {"file": path, "sha256": "0" * 64}
        {"graph": graph, "tokenizer": data["tokenizer"]}.get(place, {}).update(file=path)
        graph["external"] = [file] if place == "external" else []

    edit_manifest(own, change)
    refused(own, "leaves the bundle")


def test_links_stay_inside(own: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    shutil.move(own / "dam.onnx", outside)
    (own / "dam.onnx").symlink_to(outside)
    refused(own, "dam.onnx' is a link out of the bundle")
    shutil.copy(outside, own / "other.onnx")
    (own / "dam.onnx").unlink()
    (own / "dam.onnx").symlink_to("other.onnx")
    Bundle.open(own)


def test_external_data_is_verified(own: Path, edit_manifest: Edit) -> None:
    (own / "dam.onnx.data").write_bytes(b"weights")
    entry = {"file": "dam.onnx.data", "sha256": sha256_file(own / "dam.onnx.data")}
    edit_manifest(own, lambda data: data["graphs"]["dam"].update(external=[entry]))
    Bundle.open(own)
    (own / "dam.onnx.data").write_bytes(b"weightz")
    refused(own, "dam.onnx.data' has SHA-256")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[]", "not an object"),
        ('{"format": 1, "format": 1}', "'format' twice"),
        ('{"fps": NaN}', "NaN"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[" + "0," * 3 * 10**6, "is larger than 4194304 bytes"),
        ("\xff", "not UTF-8"),
        ("1" * 5000, "bad bundle"),
        ("{}", "lacks the key 'format'"),
    ],
)
def test_a_manifest_that_is_no_json_object(own: Path, text: str, word: str) -> None:
    (own / "manifest.json").write_bytes(text.encode("latin-1"))
    refused(own, word)


def test_a_graph_that_is_not_what_the_manifest_says(own: Path, edit_manifest: Edit) -> None:
    """Every hash is right, but two graphs have changed places, or one is no graph."""
    hashes = {name: sha256_file(own / f"{name}.onnx") for name in ("qformer", "dam")}
    (own / "qformer.onnx").rename(own / "x")
    (own / "dam.onnx").rename(own / "qformer.onnx")
    (own / "x").rename(own / "dam.onnx")

    def swap(data: dict) -> None:
        data["graphs"]["qformer"]["sha256"], data["graphs"]["dam"]["sha256"] = (
            hashes["dam"],
            hashes["qformer"],
        )

    edit_manifest(own, swap)
    with pytest.raises(
        BundleError, match="inputs of .*dam.onnx' are not those in the manifest.*picture_tokens"
    ):
        open_backend(Bundle.open(own), "cpu", 1).load(["dam"])
    for content, words in ((b"", "dam.onnx' does not load"), (b"no graph", "dam.onnx' is not a graph")):
        (own / "dam.onnx").write_bytes(content)
        found = sha256_file(own / "dam.onnx")
        edit_manifest(own, lambda data, found=found: data["graphs"]["dam"].update(sha256=found))
        with pytest.raises(BundleError, match=words) as caught:
            open_backend(Bundle.open(own), "cpu", 1).load(["dam"])
        assert "\n" not in str(caught.value)


def _weights_outside(folder: Path, edit_manifest: Edit, name: str = "dam.onnx.data") -> Path:
    """Moves the weights of a bundle's graph `dam` to a file beside it; the manifest lists it."""
    import onnx

    path = folder / "dam.onnx"
    model = onnx.load(str(path))
    onnx.save_model(model, str(path), save_as_external_data=True, location=name, size_threshold=64)
    beside = {"file": name, "sha256": sha256_file(folder / name)}
    entry = {"sha256": sha256_file(path), "external": [beside]}
    edit_manifest(folder, lambda data: data["graphs"]["dam"].update(entry))
    return folder / name


def test_weights_that_the_manifest_does_not_list_are_refused(own: Path, edit_manifest: Edit) -> None:
    data = _weights_outside(own, edit_manifest)
    open_backend(Bundle.open(own), "cpu", 1).load(["dam"])
    edit_manifest(own, lambda data: data["graphs"]["dam"].update(external=[]))
    refused(own, "dam.onnx' has weights in 'dam.onnx.data', which the manifest does not list")
    other = {"file": "other.data", "sha256": sha256_file(data)}
    shutil.copy(data, own / "other.data")
    edit_manifest(own, lambda data: data["graphs"]["dam"].update(external=[other]))
    refused(own, "which the manifest does not list")
    data.unlink()
    data.symlink_to("other.data")  # the same file, under both names
    Bundle.open(own)


@pytest.mark.parametrize("name", ["dam.onnx", "dam.onnx.data", "tokenizer.json"])
@pytest.mark.parametrize("how", ["replaced", "linked", "linked out", "gone", "written"])
def test_what_was_checked_is_what_is_used(
    own: Path, tmp_path: Path, edit_manifest: Edit, name: str, how: str
) -> None:
    """A file that becomes another one after the bundle was opened and before it is needed."""
    _weights_outside(own, edit_manifest)
    opened = Bundle.open(own)
    other = tmp_path / "other"
    other.write_bytes((own / name).read_bytes()[:-1] + b"x")

    def use() -> None:
        if name == "tokenizer.json":
            Pipeline(opened, open_backend(opened, "cpu", 1))
        else:
            open_backend(opened, "cpu", 1).load(["dam"])

    use()
    kept = (own / name).read_bytes()
    if how == "written":
        (own / name).write_bytes(other.read_bytes())
    elif how == "replaced":
        os.replace(other, own / name)
    else:
        (own / name).unlink()
        place = other if how == "linked out" else own / "inside"
        if how != "gone":
            place.write_bytes(other.read_bytes())
            (own / name).symlink_to(place)
    words = {"linked out": "is a link out of the bundle", "gone": "is missing"}.get(how, "has SHA-256")
    with pytest.raises(BundleError, match=f"{name}' {words}"):
        use()
    (own / name).unlink(missing_ok=True)
    (own / name).write_bytes(kept)
    use()  # the same bytes in another file


@pytest.mark.parametrize("name", ["dam.onnx", "dam.onnx.data"])
def test_a_file_that_changes_places_while_it_is_loaded(
    own: Path, tmp_path: Path, edit_manifest: Edit, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file lies there only for the moment in which ONNX Runtime opens it."""
    from conceptmaster.runtime.backends import onnxruntime_backend

    _weights_outside(own, edit_manifest)
    data, before, after = (own / name).read_bytes(), own / name, tmp_path / "aside"
    (tmp_path / "other").write_bytes(data)
    real = onnxruntime_backend.onnxruntime.InferenceSession

    def session(*given: object, **options: object) -> object:
        os.rename(before, after)
        os.rename(tmp_path / "other", before)
        try:
            return real(*given, **options)
        finally:
            os.rename(after, before)

    opened = Bundle.open(own)
    monkeypatch.setattr(onnxruntime_backend.onnxruntime, "InferenceSession", session)
    with pytest.raises(BundleError, match=f"{name}' was changed while it was read"):
        open_backend(opened, "cpu", 1).load(["dam"])


def test_opening_holds_no_weights_in_memory(own: Path, edit_manifest: Edit) -> None:
    size = 96 << 20
    (own / "big.data").touch()
    os.truncate(own / "big.data", size)
    entry = {"file": "big.data", "sha256": sha256_file(own / "big.data")}
    edit_manifest(own, lambda data: data["graphs"]["dam"].update(external=[entry]))
    code = (
        "import resource, sys; from conceptmaster.runtime.bundle_format.find import Bundle\n"
        "most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10\n"
        "before = most(); Bundle.open(sys.argv[1]); print(most() - before)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", code, own], env=environment, check=True, capture_output=True, text=True
    )
    assert int(run.stdout) < size // 3


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    for name in (tmp_path / "none", "none", "x" * 5000, "a\0b"):
        with pytest.raises(InputError, match="no bundle"):
            Bundle.open(name)
    with pytest.raises(InputError, match="has no manifest.json"):
        Bundle.open(tmp_path)
    with pytest.raises(InputError, match="string or a path"):
        Bundle.open(3)  # type: ignore[arg-type]


def test_shipped_bundles_go_by_name(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "SHIPPED", own.parent)
    assert bundles.shipped() == ["own"]
    assert Bundle.open("own").folder == own
    with pytest.raises(InputError, match="shipped: own"):
        Bundle.open("other")


def test_saving_is_whole_or_not_at_all(own: Path) -> None:
    opened = Bundle.open(own)
    before = (own / "manifest.json").read_bytes()
    broken = dataclasses.replace(opened.manifest, model={"rate": float("nan")})
    with pytest.raises(ValueError, match="JSON compliant"):
        manifest.save(broken, own)
    assert (own / "manifest.json").read_bytes() == before
    assert json.loads(before)["checksum"]


def test_only_a_first_frame_may_be_left_out():
    from conceptmaster.runtime.bundle_format.pictured import FrameConditioning, FramePlacement

    first = FramePlacement(0, 1, "stretched")
    assert FrameConditioning((first,), 0, 0).required == 0
    for places, dropped in (
        ((FramePlacement(-1, 1, "stretched"),), 0),
        ((FramePlacement(0, 2, "stretched"),), 0),
        ((first, FramePlacement(-1, 1, "stretched")), 0),
        ((first,), 4),
        ((), 0),
    ):
        with pytest.raises(ValueError, match="must be the first frame"):
            FrameConditioning(places, 0, dropped)
