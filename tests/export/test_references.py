"""SkyReels-V3-R2V and Phantom: their published recipes, written out here over diffusers' own modules.

After SkyReels-V3's reference_to_video_pipeline.py and Phantom's subject2video.py and generate.py, but for two
things: latents of pictures are the mean that Phantom takes, where SkyReels-V3 draws; and UniPC is diffusers'
own on the grid of sigmas that both have.
"""

from __future__ import annotations

import contextlib
import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

PROMPT, NEGATIVE = "a red ball &amp; two\n quick cats  run up", "the rain"
WIDTH, HEIGHT, FRAMES, STEPS = 64, 48, 9, 3
SIZE = ("--size", f"{WIDTH}x{HEIGHT}", "--frames", FRAMES)


def picture(seed, width, height):
    """Smooth colours, so that no two ways of scaling agree by chance."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [picture(0, 64, 48), picture(1, 190, 50), picture(2, 33, 101), picture(3, 200, 147)]
PICTURES[3].putalpha(picture(4, 200, 147).convert("L"))  # which is laid over white


@pytest.fixture(scope="module")
def parts(wan_parts):
    """Of a tiny WanPipeline, in which what stands behind the video shows in its pixels."""
    parts = wan_parts()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        torch.nn.init.normal_(parts["transformer"].patch_embedding.weight, std=0.7)
        for block in parts["transformer"].blocks:
            for norm in (block.attn1.norm_q, block.attn1.norm_k):  # so does the order of pictures
                torch.nn.init.normal_(norm.weight, std=1.2)
            for attention in (block.attn1, block.attn2):
                torch.nn.init.normal_(attention.to_v.weight, std=1.5)
                torch.nn.init.normal_(attention.to_out[0].weight, std=1.5)
    return parts


@pytest.fixture(scope="module")
def base(parts, tmp_path_factory):
    """A text-to-video folder as diffusers saves it. Not to be changed: copy it."""
    from diffusers import WanPipeline

    folder = tmp_path_factory.mktemp("bases") / "tiny"
    WanPipeline(**parts).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def v3(base):
    """SkyReels-V3's layout: the same with another class of transformer."""
    folder = base.parent / "tiny-r2v"
    shutil.copytree(base, folder)
    change(folder / "transformer" / "config.json", _class_name="SkyReelsC1WanI2v3DModel")
    return folder


@pytest.fixture(scope="module")
def phantom(parts, base):
    """Phantom's file, in Wan's own names, and what tells of tiny heads."""
    from safetensors.torch import save_file

    from conceptmaster.benchmarks.layouts import wan_transformer as original

    file = base.parent / "Phantom-Wan-1.3B.safetensors"
    state = parts["transformer"].state_dict()
    save_file({original(name): tensor.contiguous() for name, tensor in state.items()}, file)
    own = {"_class_name": "WanModel", "model_type": "t2v", "dim": 24, "num_heads": 2, "num_layers": 2}
    own |= {"in_dim": 4, "out_dim": 4, "ffn_dim": 48, "freq_dim": 16, "eps": 1e-6}
    file.with_suffix(".json").write_text(json.dumps(own))
    return file


@pytest.fixture(scope="module")
def exported(tmp_path_factory, base, taken_from):
    """`exported(place, "--references", 2, …)`: a bundle, made once. All have the same text encoder and VAE,
    whose graphs are traced for the first alone."""
    from conceptmaster.cli import main

    made, first = {}, []

    def build(place, *more):
        key = (place, *more)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundles") / "bundle"
            where = [place] if place.is_dir() else [base, "--transformer", place]
            args = ["export", *where, "--output", made[key], *SIZE, "--quiet", *more]
            shared = ("text_encoder", "encode_first", "decode_first", "decode")
            with taken_from(first[0], *shared) if first else contextlib.nullcontext():
                assert main([str(arg) for arg in args]) == 0
            first.extend([] if "--no-graphs" in more else [made[key]])
        return made[key]

    return build


def change(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def fitted(image, width, height):
    """A picture in the middle of a white frame: [3,height,width] in -1..1."""
    from PIL import Image, ImageOps

    ratio = image.width / image.height
    if ratio > width / height:
        size = width, int(width / ratio)
    else:
        size = int(height * ratio), height
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    image = white.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    borders = left, top, width - size[0] - left, height - size[1] - top
    image = ImageOps.expand(image, borders, fill=(255, 255, 255))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 * 2 - 1


def unipc(steps, shift):
    """On the grid of Wan's FlowUniPCMultistepScheduler, and of diffusers before 0.37."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    grid = np.linspace(1, 1 / 1000, 1001)[1:-1]  # as there: of 1000 sigmas, the first is .999
    grid = np.linspace(grid[0], 0.0, steps + 1)[:-1]
    grid = shift * grid / (1 + (shift - 1) * grid)
    scheduler.sigmas = torch.from_numpy(np.append(grid, 0.0).astype(np.float32))
    scheduler.timesteps = torch.from_numpy(grid * 1000).to(torch.int64)
    scheduler.set_begin_index(0)
    return scheduler


@torch.no_grad()
def restated(parts, images, noise, scales=(), places=None, width=WIDTH, height=HEIGHT, shift=5.0):
    """Frames in 0..255. scales: of pictures and text, or of both; places: padded with zeros to so many."""
    from diffusers import WanPipeline

    pipeline = WanPipeline(**parts)
    text, negative = pipeline.encode_prompt(PROMPT, NEGATIVE, max_sequence_length=512)
    vae, transformer = parts["vae"], parts["transformer"]
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    pictures = [fitted(image, width, height)[None, :, None] for image in images]
    latents = [(vae.encode(pixels).latent_dist.mode() - mean) / std for pixels in pictures]
    latents += [torch.zeros_like(latents[0])] * ((places or 0) - len(latents))
    behind = torch.cat(latents, dim=2)

    def velocity(x, time, behind, text):
        found = transformer(torch.cat((x, behind), dim=2), time.expand(1), text, return_dict=False)[0]
        return found[:, :, : x.shape[2]]

    x, scheduler = torch.from_numpy(noise)[None], unipc(STEPS, shift)
    for time in scheduler.timesteps:
        both = velocity(x, time, behind, text)
        if scales:
            alone = velocity(x, time, torch.zeros_like(behind), negative)
            pictured = velocity(x, time, behind, negative)
            of_pictures, of_text = scales if len(scales) == 2 else (0, 0)
            guided = alone + of_pictures * (pictured - alone) + of_text * (both - pictured)
            both = guided if len(scales) == 2 else alone + scales[0] * (both - alone)
        x = scheduler.step(both, time, x, return_dict=False)[0]
    frames = vae.decode(x * std + mean, return_dict=False)[0]
    return ((frames[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1) * 255).numpy()


def held(found, frames):
    """The same to one grey level, of a video in which there is something to see."""
    assert found.shape == frames.shape and found.dtype == np.uint8
    assert frames.std() > 5 and (frames % 255 != 0).mean() > 0.5
    assert abs(found - frames).max() <= 1.0


def noise_for(seed=0, width=WIDTH, height=HEIGHT):
    return np.random.default_rng(seed).standard_normal((4, 3, height // 8, width // 8), np.float32)


def test_places_without_a_picture_are_zero(parts, v3, exported, generated):
    """SkyReels-V3 as it is shipped: one branch, one bundle for 1 to 4 references, with ONNX Runtime."""
    bundle = exported(v3)
    seen = []
    for count in (1, 2, 3, 4):
        noise, images = noise_for(count), PICTURES[-count:]
        frames = restated(parts, images, noise, places=4)
        held(generated(bundle, images, noise), frames)
        if count < 4:
            seen.append(abs(frames - restated(parts, images, noise)).max())
    assert max(seen) > 2  # an empty place is not the same as none


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_three_branches(parts, base, phantom, exported, generated, count):
    """Phantom as it is shipped, with the torch backend; of two, with ONNX Runtime as well."""
    noise, images = noise_for(count), PICTURES[:count]
    frames = restated(parts, images, noise, (5.0, 7.5))
    if count > 1:  # neither order nor either scale is without effect
        for other, scales in ((images[::-1], (5.0, 7.5)), (images, (7.5, 7.5)), (images, (5.0, 5.0))):
            assert abs(frames - restated(parts, other, noise, scales)).max() > 2
    bundle = exported(phantom, "--references", count, *([] if count == 2 else ["--no-graphs"]))
    with_torch = ("--backend", "torch", "--weights", base, "--transformer", phantom)
    held(generated(bundle, images, noise, *with_torch), frames)
    if count == 2:
        held(generated(bundle, images, noise), frames)


@pytest.mark.parametrize(
    ("place", "images", "branches", "scales"),
    [
        ("v3", PICTURES[:3], 2, (6.0,)),
        ("v3", PICTURES[:3], 3, (2.0, 4.0)),
        ("phantom", PICTURES[1:3], 1, ()),
        ("phantom", PICTURES[1:3], 2, (6.0,)),
    ],
)
def test_any_number_of_branches(
    parts, base, phantom, v3, exported, generated, place, images, branches, scales
):
    """With the torch backend: none, the joint scale, both scales."""
    noise, where = noise_for(7), {"v3": v3, "phantom": phantom}[place]
    references = () if place == "v3" else ("--references", len(images))
    bundle = exported(where, *references, "--branches", branches, "--no-graphs")
    asked = ["--guidance", scales[-1]] if scales else []
    asked += ["--concept-guidance", scales[0]] if branches == 3 else []
    weights = [where] if where.is_dir() else [base, "--transformer", where]
    found = generated(bundle, images, noise, "--backend", "torch", "--weights", *weights, *asked)
    held(found, restated(parts, images, noise, scales, 4 if place == "v3" else None))


def test_a_picture_is_fitted_as_there():
    """Pixel by pixel, of all shapes; where theirs has no side left, ours has one pixel."""
    from PIL import Image

    from conceptmaster.runtime.pictures import fit

    rng, white = np.random.default_rng(0), (255, 255, 255)
    for _ in range(60):
        (w, h), (width, height) = rng.integers(8, 200, 2), 16 * rng.integers(3, 20, 2)
        size = int(width), int(height)
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        theirs = (fitted(image, *size).permute(1, 2, 0).double() + 1) * 127.5
        assert np.array_equal(fit(image, size, "centred", white), theirs.round().numpy())
    thin = fit(Image.new("RGB", (2000, 1)), (64, 48), "centred", white)
    assert (thin < 255).any(axis=2).sum() == 64


@pytest.mark.slow
@pytest.mark.parametrize(("count", "width", "height"), [(1, 48, 80), (3, 96, 32), (4, 32, 64)])
@pytest.mark.parametrize("place", ["v3", "phantom"])
def test_graphs_of_other_sizes(
    parts, base, v3, phantom, generated, command, tmp_path, place, count, width, height
):
    """With ONNX Runtime; of fewer text tokens, in int8 and in tiles, too, which are not the same frames."""
    noise, images = noise_for(count, width, height), PICTURES[:count]
    where = [v3] if place == "v3" else [base, "--transformer", phantom, "--references", count]
    size = ("--size", f"{width}x{height}", "--frames", FRAMES, "--quiet")
    scales, places = ((), 4) if place == "v3" else ((5.0, 7.5), None)
    frames = restated(parts, images, noise, scales, places, width, height)
    for name, more in (("whole", ()), ("short", ("--text-tokens", 80))):
        code, _, err = command("export", *where, "--output", tmp_path / name, *size, *more)
        assert code == 0, err
        held(generated(tmp_path / name, images, noise), frames)
    code, _, err = command(
        "export", *where, "--output", tmp_path / "near", *size, "--int8", "--tile", "32x32"
    )
    assert code == 0, err
    assert abs(generated(tmp_path / "near", images, noise) - frames).mean() < 20


# What a folder is told by.


def opened(place, **choices):
    """The source at a place."""
    from conceptmaster.engine.checkpoints.source import Choices, open_source

    return open_source(place, Choices((WIDTH, HEIGHT), FRAMES, **choices))


def what(source):
    """What a source is, and how it is sampled."""
    s, c = source.sampling, source.model.config
    assert c.concept.given == "behind" and s.branches == 3
    scales = (s.solver, s.shift, s.steps, s.guidance, s.concept_guidance)
    return (*scales, c.fps, c.concept.max_concepts, c.concept.fewest, s.negative)


# The start of the negative prompt of Wan's own programs.
WAN_NEGATIVE = "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，"


@pytest.mark.parametrize(
    ("transformer", "index"),
    [
        ("SkyReelsA2WanI2v3DModel", {"_class_name": "WanPipeline"}),
        ("SkyReelsC1WanI2v3DModel", ...),
        ("WanTransformer3DModel", {"_class_name": "WanSkyReelsA2WanT2VPipeline"}),
        ("WanTransformer3DModel", {"transformer": ["skyreels_v3", "SkyReelsA2WanI2v3DModel"]}),
    ],
)
def test_a_class_tells_skyreels_v3(base, tmp_path, transformer, index):
    """Whatever its scheduler's file says: the program makes its own."""
    own = tmp_path / "weights"
    shutil.copytree(base, own)
    change(own / "transformer" / "config.json", _class_name=transformer)
    (own / "model_index.json").unlink()
    if index is not ...:
        (own / "model_index.json").write_text(json.dumps(index))
    assert what(opened(own)) == ("unipc_wan", 5.0, 8, 1.0, None, 24.0, 4, 1, "")


@pytest.mark.parametrize(
    ("name", "references"),
    [
        ("Phantom-Wan-1.3B.safetensors", None),
        ("Phantom_Wan_14B-fp8.safetensors", 3),
        ("renamed.safetensors", 2),
    ],
)
def test_a_name_or_a_number_of_references_tells_phantom(base, phantom, tmp_path, caplog, name, references):
    file = tmp_path / name
    shutil.copy(phantom, file)
    shutil.copy(phantom.with_suffix(".json"), file.with_suffix(".json"))
    *found, negative = what(opened(base, parts={"transformer": file}, references=references))
    assert found == ["unipc_wan", 5.0, 50, 7.5, 5.0, 16.0, references or 1, None]
    assert ("nothing calls it a Phantom" in caplog.text) == (name == "renamed.safetensors")
    assert negative.startswith(WAN_NEGATIVE) and negative.endswith("三条腿，背景人很多，倒着走")


def test_a_name_tells_a_single_file_of_skyreels_v3(base, phantom, tmp_path):
    """As ComfyUI has it, in Wan's names and without a class."""
    file = tmp_path / "Wan21-SkyReelsV3-R2V_fp16.safetensors"
    shutil.copy(phantom, file)
    shutil.copy(phantom.with_suffix(".json"), file.with_suffix(".json"))
    found = what(opened(base, parts={"transformer": file}))
    assert found == ("unipc_wan", 5.0, 8, 1.0, None, 24.0, 4, 1, "")


def test_without_either_it_is_plain(base, phantom, tmp_path):
    """A folder's name tells of the transformer in it, and not of one that lies elsewhere."""
    file = tmp_path / "wan.safetensors"
    shutil.copy(phantom, file)
    shutil.copy(phantom.with_suffix(".json"), file.with_suffix(".json"))
    own = tmp_path / "phantoms"
    shutil.copytree(base, own)
    for source in (opened(base), opened(own, parts={"transformer": file})):
        assert source.model.config.concept.given == "none" and source.sampling.branches is None
    assert what(opened(own))[:3] == ("unipc_wan", 5.0, 50)


def test_releases_by_their_size():
    """Phantom's 14B was trained at 24 frames a second, and its program's commands make 121 of them."""
    from pathlib import Path

    from conceptmaster.engine.checkpoints.base import Base, Part
    from conceptmaster.engine.checkpoints.releases import release_of
    from conceptmaster.engine.checkpoints.wan_references import told

    for layers, fps, frames in ((30, 16.0, 81), (40, 24.0, 121)):
        part = Part({"in_channels": 16, "num_layers": layers}, {}, Path("Phantom.safetensors"), Path())
        release = release_of(told(Base(Path("x"), "", {"transformer": part}), None))
        assert (release.fps, release.frames, release.size) == (fps, frames, (832, 480))


@pytest.mark.parametrize(
    ("place", "asked", "message"),
    [
        ("phantom", ("--references", 5), "references must be 1 to 4 for Phantom, got 5"),
        ("phantom", ("--references", 0), "references must be 1 to 4 for Phantom, got 0"),
        ("v3", ("--references", 2), "requests have 1 to 4: leave out references"),
        ("v3", ("--size", "100x60"), "the nearest that works is 9 frames of 96x64; SkyReels-V3's own size"),
        ("v3", ("--size", "60x60"), "own size of this shape is 960x960"),
        ("v3", ("--adapter", "no.safetensors"), "no.safetensors"),
        ("i2v", ("--references", 2), "takes no number of references"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(base, v3, phantom, command, tmp_path, place, asked, message):
    where = {"v3": [v3], "phantom": [base, "--transformer", phantom], "i2v": [tmp_path / "own"]}[place]
    if place == "i2v":
        shutil.copytree(base, tmp_path / "own")
        change(tmp_path / "own" / "model_index.json", expand_timesteps=True)
    code, out, err = command("export", *where, "--output", tmp_path / "out", *SIZE, *asked, "--no-graphs")
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize("options", [(), ("--references", 2)])
def test_a_text_to_video_transformer_under_another_pipelines_name(base, command, tmp_path, options):
    own = tmp_path / "own"
    shutil.copytree(base, own)
    change(own / "model_index.json", _class_name="WanImageToVideoPipeline")
    code, _, err = command("export", own, "--output", tmp_path / "out", *SIZE, "--no-graphs", *options)
    message = "takes no number of references" if options else "its transformer has no channels for pictures"
    assert code == 2 and err.count("\n") == 1 and message in err, err


def test_a_pickle_is_to_be_converted(base, phantom, command, tmp_path):
    """As Phantom's 1.3B is published; then the same bundle comes out of what `convert` writes."""
    from safetensors.torch import load_file

    pickle = tmp_path / "Phantom-Wan-1.3B.pth"
    torch.save(load_file(phantom), pickle)
    args = (base, "--transformer", pickle, "--output", tmp_path / "out", *SIZE, "--no-graphs")
    code, out, err = command("export", *args)
    assert (code, out) == (2, "") and err.count("\n") == 1 and "conceptmaster convert" in err, err
    code, _, err = command("convert", pickle, pickle.with_suffix(".safetensors"))
    assert code == 0, err
    shutil.copy(phantom.with_suffix(".json"), tmp_path)
    found = opened(base, parts={"transformer": pickle.with_suffix(".safetensors")})
    expected = opened(base, parts={"transformer": phantom})
    assert what(found) == what(expected)
    states = [source.model.transformer.state_dict() for source in (found, expected)]
    assert states[0].keys() == states[1].keys()
    assert all(states[0][name].equal(tensor) for name, tensor in states[1].items())


def test_what_the_bundles_are(base, v3, phantom, exported, command, tmp_path):
    from conceptmaster.runtime.bundle_format.manifest import load

    bundles = exported(v3), exported(phantom, "--references", 2)
    names = {"text_encoder", "condition", "denoise", "encode_first", "decode_first", "decode"}
    for bundle, least, most, branches, first in zip(
        bundles, (1, 2), (4, 2), (1, 3), ("caption", "concepts"), strict=True
    ):
        manifest = load(bundle)
        assert set(manifest.graphs) == names and manifest.format == 6
        assert (manifest.concepts, manifest.conditioning.required) == (most, least)
        assert (manifest.shapes.branches, manifest.guided_first) == (branches, first)
        assert manifest.denoised == manifest.shapes.latent == (4, 3, HEIGHT // 8, WIDTH // 8)
        assert manifest.graphs["denoise"].input("given").shape == (1, 4, most, HEIGHT // 8, WIDTH // 8)
        code, out, _ = command("inspect", bundle)
        told = "1 to 4, as clean" if most == 4 else "2, as clean"
        assert code == 0 and f"{told} latent frames behind the video's" in out
        picture(0, 20, 20).save(tmp_path / "a.png")
        for count in (0, most + 1):
            concepts = [x for i in range(count) for x in ("--concept", f"thing {i}", tmp_path / "a.png")]
            args = ("--prompt", PROMPT, *concepts, "--output", tmp_path / "a.npy")
            code, out, err = command("generate", "--bundle", bundle, *args)
            message = f"takes at most {most}" if count else f"give it {('1 to 4', '2')[least - 1]} pictures"
            assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err
    code, out, err = command("verify", bundles[1], "--source", base, "--transformer", phantom)
    assert (code, err) == (0, "") and out.count("ok") == len(names)


def test_a_caption_names_its_references(v3, exported):
    from conceptmaster import Concept, Pipeline
    from conceptmaster.errors import InputError

    with Pipeline.from_bundle(exported(v3), threads=1) as pipeline:
        with pytest.warns(match="the label 'dog' is not in the caption"):
            pipeline("a red ball", [Concept("red ball", PICTURES[0]), Concept("dog", PICTURES[1])], steps=1)
        with pytest.raises(InputError, match="the label 'dog'"):
            pipeline("a red ball", [Concept("dog", PICTURES[1])], steps=1, strict=True)
        long = "very " * 40 + "red ball"  # nothing reads it, so it may be as long as the caption is
        pipeline(f"a {long}", [Concept(long, PICTURES[0])], steps=1, strict=True)
