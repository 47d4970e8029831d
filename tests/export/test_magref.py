"""MAGREF: an image-to-video model whose first frame is a canvas of references, against its own program's
recipe (subject2video.py, generate.py, modules/clip.py), written out here around diffusers' and transformers'
modules. References and cells are taken in order, where its program shuffles both."""

from __future__ import annotations

import html
import json
import re
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

PROMPT, NEGATIVE = "a red ball &amp; two\n quick cats  run up", "the rain"
WIDTH, HEIGHT, FRAMES, STEPS, GUIDANCE, SHIFT = 64, 48, 9, 3, 5.0, 3.0
SIZE = ("--size", f"{WIDTH}x{HEIGHT}", "--frames", FRAMES)
LATENT = (4, 3, HEIGHT // 8, WIDTH // 8)
GRAPHS = {"text_encoder", "image_encoder", "condition", "denoise", "encode_first", "encode", "decode_first"}
GRAPHS |= {"decode"}


def picture(seed, width, height, mode="RGB"):
    """Smooth colours, so that no two ways of scaling agree by chance."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


PICTURES = [
    picture(0, 64, 48),
    picture(1, 150, 30),  # wide
    picture(2, 33, 101, "RGBA"),  # tall
    picture(3, 9, 11, "L"),
    picture(4, 40, 40),
    picture(5, 200, 147, "RGBA"),
    picture(6, 20, 90),
    picture(7, 90, 20),
]


# The recipe.


def grid(count, width, height):
    """left, top, right, bottom of the cells, of a frame for so many references."""
    scale = min(s for s in (1, 2, 3, 4, 6, 8) if s >= count)
    columns, rows = {1: (1, 1), 2: (2, 1), 3: (3, 1), 4: (2, 2), 6: (3, 2), 8: (4, 2)}[scale]
    w, h = width // columns, height // rows
    found = []
    for index in range(scale):
        row, column = divmod(index, columns)
        right = width if column == columns - 1 else (column + 1) * w
        bottom = height if row == rows - 1 else (row + 1) * h
        found.append((column * w, row * h, right, bottom))
    return found


def composed(images, width, height):
    """The canvas, an image, and where it is filled, uint8 [height,width]."""
    from PIL import Image, ImageOps

    canvas = Image.new("RGB", (width, height), (255, 255, 255))
    filled = np.zeros((height, width), np.uint8)
    for image, (left, top, right, bottom) in zip(images, grid(len(images), width, height), strict=False):
        white = Image.new("RGB", image.size, (255, 255, 255))
        if image.mode == "RGBA":
            white.paste(image, mask=image.getchannel("A"))
        else:
            white = image.convert("RGB")
        cell_w, cell_h = right - left, bottom - top
        ratio = white.width / white.height
        if ratio > cell_w / cell_h:
            size = cell_w, int(cell_w / ratio)
        else:
            size = int(cell_h * ratio), cell_h
        pad_w, pad_h = cell_w - size[0], cell_h - size[1]
        border = (pad_w // 2, pad_h // 2, pad_w - pad_w // 2, pad_h - pad_h // 2)
        scaled = white.resize(size, Image.Resampling.LANCZOS)
        canvas.paste(ImageOps.expand(scaled, border, fill=(255, 255, 255)), (left, top))
        filled[top:bottom, left:right] = np.asarray(ImageOps.expand(Image.new("L", size, 1), border, fill=0))
    return canvas, filled


def downsampled(filled, factor=8):
    """One where any pixel of a latent is filled."""
    found = np.zeros((filled.shape[0] // factor, filled.shape[1] // factor), np.float32)
    for i, j in np.ndindex(*found.shape):
        found[i, j] = filled[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor].any()
    return torch.from_numpy(found)


def clip_view(pixels, side):
    """What CLIP sees of [3,h,w] in -1..1: stretched, and normalised."""
    small = torch.nn.functional.interpolate(pixels[None], (side, side), mode="bicubic", align_corners=False)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return (small * 0.5 + 0.5 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def text_of(parts, text):
    text = re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()
    ids = parts["tokenizer"](text, return_tensors="pt").input_ids
    found = parts["text_encoder"](ids).last_hidden_state
    return torch.nn.functional.pad(found, (0, 0, 0, 512 - found.shape[1]))


@torch.no_grad()
def recipe(parts, images, noise, width=WIDTH, height=HEIGHT, frames=FRAMES, negative=NEGATIVE, steps=STEPS):
    """The frames in 0..255, [F-4,height,width,3], of noise [Cz,F,H,W]."""
    from diffusers import UniPCMultistepScheduler

    vae, transformer = parts["vae"], parts["transformer"]
    canvas, filled = composed(images, width, height)
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255
    pixels = (pixels - 0.5) / 0.5
    clip = parts["image_encoder"](clip_view(pixels, 16), output_hidden_states=True).hidden_states[-2]
    video = torch.cat([pixels[:, None], torch.zeros(3, frames - 1, height, width)], dim=1)[None]
    mean, std = (torch.tensor(vae.config[f"latents_{n}"]).view(1, -1, 1, 1, 1) for n in ("mean", "std"))
    latents = (vae.encode(video).latent_dist.mode() - mean) / std
    mask = torch.zeros(1, frames, height // 8, width // 8)
    mask[:, :1] = downsampled(filled)
    mask = torch.cat([mask[:, :1].repeat_interleave(4, dim=1), mask[:, 1:]], dim=1)
    mask = mask.view(1, mask.shape[1] // 4, 4, height // 8, width // 8).transpose(1, 2)
    y = torch.cat([mask, latents], dim=1)

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    scheduler.set_timesteps(steps)
    sigmas = np.linspace(0.999, 0.0, steps + 1)[:-1]
    sigmas = SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))
    scheduler.timesteps = torch.from_numpy(sigmas * 1000).to(torch.int64)
    scheduler.set_begin_index(0)
    texts = text_of(parts, PROMPT), text_of(parts, negative)
    x = torch.from_numpy(noise)[None]
    for time in scheduler.timesteps:
        wanted, unwanted = (
            transformer(torch.cat([x, y], dim=1), time[None], text, clip, return_dict=False)[0]
            for text in texts
        )
        x = scheduler.step(unwanted + GUIDANCE * (wanted - unwanted), time, x, return_dict=False)[0]
    decoded = vae.decode(x * std + mean).sample[0].clamp(-1, 1)  # [3,F,height,width]
    return ((decoded + 1) * 127.5).permute(1, 2, 3, 0).numpy()[4:]


# Its folder, in Wan's own layout.


@pytest.fixture(scope="module")
def parts(image_to_video_parts):
    """Modules whose mask shows in the pixels, too."""
    parts = image_to_video_parts()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        torch.nn.init.normal_(parts["transformer"].patch_embedding.weight[:, 4:8], std=3.0)
    return parts


def write_folder(parts, folder):
    """As `conceptmaster convert` leaves MAGREF's: names of Wan's own code; tiny sizes told beside."""
    from safetensors.torch import save_file

    from conceptmaster.benchmarks import layouts

    folder.mkdir()
    config = dict(parts["transformer"].config)
    (folder / "config.json").write_text(json.dumps(layouts.wan_config(config, "i2v")))
    vae = dict(parts["vae"].config)
    rename = {
        "diffusion_pytorch_model": ("transformer", layouts.wan_transformer),
        "Wan2.1_VAE": ("vae", layouts.wan_vae(vae)),
        "models_t5_umt5-xxl-enc-bf16": ("text_encoder", layouts.wan_text_encoder),
    }
    for stem, (part, name_of) in rename.items():
        state = {k: v for k, v in parts[part].state_dict().items() if "embed_tokens" not in k}
        named = {name_of(name): tensor.contiguous() for name, tensor in state.items()}
        save_file(named, folder / f"{stem}.safetensors")
    (folder / "Wan2.1_VAE.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"} | plain(vae)))
    clip = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
    tower = {k: v.clone() for k, v in parts["image_encoder"].state_dict().items() if "position_ids" not in k}
    save_file(layouts.wan_clip(tower), folder / f"{clip}.safetensors")
    sizes = parts["image_encoder"].config.to_dict() | {"model_type": "clip_vision_model"}
    (folder / f"{clip}.json").write_text(json.dumps(sizes, default=str))
    (folder / "google" / "umt5-xxl").mkdir(parents=True)
    parts["tokenizer"].backend_tokenizer.save(str(folder / "google" / "umt5-xxl" / "tokenizer.json"))
    return folder


def plain(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """Not to be changed: copy it."""
    return write_folder(parts, tmp_path_factory.mktemp("bases") / "MAGREF")


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory):
    """With graphs."""
    from conceptmaster.cli import main

    place = tmp_path_factory.mktemp("bundles") / "magref"
    assert main(["export", str(folder), "--output", str(place), *map(str, SIZE), "--quiet"]) == 0
    return place


def held(found, frames):
    """The same to one grey level, of a video in which there is something to see."""
    assert found.shape == frames.shape and found.dtype == np.uint8
    assert frames.std() > 5 and (frames % 255 != 0).mean() > 0.5
    assert abs(found - frames).max() <= 1.0


def noise_for(seed, latent=LATENT):
    return np.random.default_rng(seed).standard_normal(latent, np.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 8])
def test_references_give_the_recipe_s_frames(parts, folder, bundle, generated, count):
    """With PyTorch; of three and of five, with ONNX Runtime as well."""
    images, noise = PICTURES[:count], noise_for(count)
    frames = recipe(parts, images, noise)
    held(generated(bundle, images, noise, "--backend", "torch", "--weights", folder), frames)
    if count in (3, 5):
        held(generated(bundle, images, noise), frames)
        assert abs(frames - recipe(parts, images[::-1], noise)).max() > 2  # their order counts


def test_the_canvas_and_what_clip_sees_of_it():
    """At the size of MAGREF's own program, and others, of pictures of all shapes."""
    from PIL import Image

    from conceptmaster.runtime import pictures
    from conceptmaster.runtime.bundle_format.pictured import Pictures
    from conceptmaster.runtime.canvas import Canvas

    class Shapes:
        space, picture_size = 8, 224

    class Manifest:
        shapes = Shapes()
        pictures = Pictures((0.5,) * 3, (0.25,) * 3, (255, 255, 255), "bicubic")

    rng = np.random.default_rng(0)
    for trial in range(24):
        count, size = 1 + trial % 8, (832, 480) if trial < 8 else tuple(16 * rng.integers(1, 20, 2))
        Shapes.width, Shapes.height = map(int, size)
        shapes = rng.integers(40, 200, (count, 2))
        images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in shapes]
        canvas = Canvas(Manifest, count)
        for index, image in enumerate(images):
            canvas.place(index, image)
        right, filled = composed(images, *map(int, size))
        assert np.array_equal(canvas.pixels, np.asarray(right)) and np.array_equal(canvas.filled, filled)
        assert np.array_equal(canvas.area(), downsampled(filled).numpy() > 0)
        pixels = torch.from_numpy(np.array(right)).permute(2, 0, 1) / 127.5 - 1
        mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
        found = pictures.normalise(canvas.seen(), mean, std)
        np.testing.assert_allclose(found, clip_view(pixels, 224)[0], atol=1e-3)
    thin = Canvas(Manifest, 8)  # of which its own program cannot make a picture of no pixels
    thin.place(3, Image.new("RGB", (1, 5000)))
    assert thin.filled.any(axis=0).sum() == 1


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height", "frames", "count"), [(48, 80, 9, 2), (80, 32, 5, 6)])
def test_other_sizes(parts, folder, generated, command, tmp_path, width, height, frames, count):
    """Portrait, and few frames; with ONNX Runtime; in tiles, and with less text."""
    images, noise = PICTURES[:count], noise_for(9, (4, 1 + frames // 4, height // 8, width // 8))
    args = ("--frames", frames, "--size", f"{width}x{height}", "--quiet")
    code, _, err = command("export", folder, "--output", tmp_path / "whole", *args)
    assert code == 0, err
    expected = recipe(parts, images, noise, width, height, frames)
    assert len(expected) == frames - 4
    held(generated(tmp_path / "whole", images, noise), expected)
    assert command("export", folder, "--output", tmp_path / "tiles", *args, "--tile", "32x32")[0] == 0
    assert generated(tmp_path / "tiles", images, noise).shape == expected.shape
    code, _, err = command("export", folder, "--output", tmp_path / "short", *args, "--text-tokens", 500)
    assert code == 0, err
    held(generated(tmp_path / "short", images, noise), expected)
    code, _, err = command("export", folder, "--output", tmp_path / "8", *args, "--int8")
    assert code == 0, err
    assert abs(generated(tmp_path / "8", images, noise) - expected).mean() < 20


def test_its_own_defaults(parts, folder, bundle, command, tmp_path):
    """Its own negative prompt, which begins before Wan's."""
    from conceptmaster.runtime.bundle_format.manifest import load

    manifest = load(bundle)
    d = manifest.defaults
    assert (d.solver, d.shift, d.steps, d.guidance) == ("unipc_wan", 3.0, 40, 5.0)
    assert d.negative.startswith("镜头晃动，色调艳丽，过曝，静态，") and d.negative.endswith(
        "背景人很多，倒着走"
    )
    assert (manifest.fps, manifest.format, manifest.shapes.branches) == (15.0, 6, 2)
    noise = noise_for(20)
    np.save(tmp_path / "noise.npy", noise)
    PICTURES[0].save(tmp_path / "a.png")
    asked = ("--prompt", PROMPT, "--concept", "red ball", tmp_path / "a.png", "--steps", 2, "--threads", 1)
    files = ("--noise", tmp_path / "noise.npy", "--output", tmp_path / "a.npy", "--quiet")
    code, _, err = command("generate", "--bundle", bundle, *asked, *files)
    assert (code, err) == (0, "")
    held(np.load(tmp_path / "a.npy"), recipe(parts, PICTURES[:1], noise, negative=d.negative, steps=2))


def test_what_the_bundle_is(folder, bundle, command, tmp_path):
    from conceptmaster.export.triton_server.repository import pipeline_config
    from conceptmaster.runtime.bundle_format.manifest import load
    from conceptmaster.runtime.frame_conditioning import lengths

    manifest = load(bundle)
    assert set(manifest.graphs) == GRAPHS
    assert (manifest.concepts, manifest.shapes.concepts, manifest.conditioning.kind) == (8, 1, "canvas")
    assert manifest.graphs["image_encoder"].input("pixels").shape == (1, 3, 16, 16)
    assert manifest.graphs["denoise"].input("concept_mask").shape == (2, 1)
    assert manifest.denoised == manifest.shapes.latent == LATENT
    assert lengths(manifest) == (FRAMES - 4, FRAMES - 4)
    assert f"dims: [{FRAMES - 4}, {HEIGHT}, {WIDTH}, 3]" in pipeline_config(manifest)
    code, out, _ = command("inspect", bundle)
    assert code == 0
    assert "concepts  up to 8, their canvas seen as 16×16, 5 tokens" in out
    assert "pictures  1 to 8, in cells of one canvas, which is frame 0; 4 frames are left out" in out
    code, out, err = command("verify", bundle, "--source", folder)
    assert (code, err) == (0, "") and out.count(" ok\n") == len(GRAPHS)
    PICTURES[0].save(tmp_path / "a.png")
    for count, message in ((0, "give it 1 to 8 pictures"), (9, "takes at most 8")):
        concepts = [x for i in range(count) for x in ("--concept", f"thing {i}", tmp_path / "a.png")]
        args = ("--prompt", PROMPT, *concepts, "--output", tmp_path / "a.npy")
        code, out, err = command("generate", "--bundle", bundle, *args)
        assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err
    args = ("--prompt", "it rains", "--concept", "red ball", tmp_path / "a.png", "--steps", 1)
    code, out, err = command(
        "generate", "--bundle", bundle, *args, "--output", tmp_path / "a.npy", "--strict"
    )
    assert code == 2 and "the label 'red ball' is not in the caption" in err


def test_the_video_and_its_preview(bundle):
    """The preview is of a frame that is kept; the pictures of a video are those that were given."""
    from conceptmaster import Concept, Pipeline

    seen = []
    with Pipeline.from_bundle(bundle, threads=1) as pipeline:
        concepts = [Concept("ball", PICTURES[1]), Concept("cats", PICTURES[2])]
        video = pipeline("a ball, two cats", concepts, steps=1, callback=lambda *step: seen.append(step[2]()))
    assert seen[0].shape == (HEIGHT, WIDTH, 3) and video.frames.shape[0] == FRAMES - 4
    assert [c.image.shape for c in video.concepts] == [(16, 16, 3)] * 2
    assert (video.concepts[0].image[0] == 255).all() and video.concepts[0].image.dtype == np.uint8  # wide
    assert video.sheet() is not None


# What tells it from Wan2.1's I2V-14B.


def kind(place, **parts):
    from conceptmaster.engine.checkpoints.single_files import open_base
    from conceptmaster.engine.checkpoints.wan import read_config, read_sampling

    base = open_base(place, parts)
    config = read_config(base, "a", (WIDTH, HEIGHT), FRAMES)
    sampling = read_sampling(base)
    return config.concept.given, config.fps, sampling.solver, sampling.steps


MAGREF, WAN = ("canvas", 15.0, "unipc_wan", 40), ("first", 16.0, "unipc", 40)


def test_its_name_tells_it(folder, tmp_path):
    """Of the folder, of a link to it, of the file; else it is a Wan2.1, whatever is around it."""
    assert kind(folder) == MAGREF
    plain = shutil.copytree(folder, tmp_path / "magref" / "Wan2.1-I2V-14B-480P")
    assert kind(plain) == WAN
    (tmp_path / "link").symlink_to(folder)
    assert kind(tmp_path / "link") == MAGREF
    (tmp_path / "Magref-14b").symlink_to(plain)
    assert kind(tmp_path / "Magref-14b") == MAGREF
    file = tmp_path / "Wan2_1-Wan-I2V-MAGREF-14B_fp8_e4m3fn.safetensors"
    shutil.copy(plain / "diffusion_pytorch_model.safetensors", file)
    shutil.copy(plain / "config.json", file.with_suffix(".json"))
    assert kind(plain, transformer=file) == MAGREF
    assert kind(file, **{
        "vae": plain / "Wan2.1_VAE.safetensors",
        "text_encoder": plain / "models_t5_umt5-xxl-enc-bf16.safetensors",
        "image_encoder": next(plain.glob("models_clip*.safetensors")),
    }) == MAGREF  # fmt: skip
    models = shutil.copytree(plain, tmp_path / "models")
    (models / "diffusion_models").mkdir()
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        (models / name).unlink()
    for path in (file, file.with_suffix(".json")):
        shutil.copy(path, models / "diffusion_models")
    assert kind(models) == MAGREF


def test_its_configuration_may_tell_it(folder, tmp_path):
    own = shutil.copytree(folder, tmp_path / "own")
    assert kind(own) == WAN
    values = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(values | {"_name_or_path": "MAGREF-Video/MAGREF"}))
    assert kind(own) == MAGREF


def test_a_folder_of_the_hub_and_diffusers_layout(image_to_video_parts, tmp_path):
    """As somebody may convert it: the scheduler of a conversion is not MAGREF's."""
    from diffusers import WanImageToVideoPipeline

    folder = tmp_path / "models--somebody--MAGREF-Diffusers" / "snapshots" / "0123abcd"
    WanImageToVideoPipeline(**image_to_video_parts()).save_pretrained(folder)
    assert kind(folder) == MAGREF
    folder.rename(tmp_path / "wan")
    assert kind(tmp_path / "wan")[0] == "first"


def test_other_models_of_that_name(saved_flf2v, wan_folder, tmp_path):
    """What has keys of its own is what these say."""
    assert kind(saved_flf2v)[0] == "first_last"
    assert kind(shutil.copytree(wan_folder, tmp_path / "magref"))[0] == "none"


@pytest.fixture
def saved_flf2v(image_to_video_parts, tmp_path):
    from diffusers import WanImageToVideoPipeline

    WanImageToVideoPipeline(**image_to_video_parts(10)).save_pretrained(tmp_path / "magref-flf2v")
    return tmp_path / "magref-flf2v"


def test_what_a_manifest_may_say_of_a_canvas():
    from conceptmaster.runtime.bundle_format.pictured import FrameConditioning, FramePlacement

    cell = FramePlacement(0, 1, "centred")
    good = FrameConditioning((cell,) * 8, 1, 4, kind="canvas")
    assert [good.leading(count) for count in (0, 1, 8)] == [0, 4, 4]
    for places, least, beside in (
        ((cell,) * 9, 1, 0),
        ((cell,) * 2, 2, 0),
        ((FramePlacement(0, 2, "centred"),), 1, 0),
        ((FramePlacement(1, 1, "centred"),), 1, 0),
        ((FramePlacement(0, 1, "stretched"),), 1, 0),
        ((cell,), 1, 1),
    ):
        with pytest.raises(ValueError, match=r"a canvas is the first frame, of 1 to 8 centred|beside must"):
            FrameConditioning(places, least, 4, beside, "canvas")


def test_its_published_sizes_are_those_of_wan_s_i2v_14b():
    import diffusers

    from conceptmaster.engine.dit import ConceptDiT
    from conceptmaster.engine.presets import preset

    sizes = {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
    pictures = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(**sizes, **pictures).state_dict()
        ours = ConceptDiT(preset("magref-14b")).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {
        k: v.shape for k, v in theirs.items() if "norm_added_q" not in k
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["diffusers", "wan", "comfyui"])
def test_random_folders_of_its_sizes(layout, tmp_path):
    """What benchmarks/random_base writes is read as the preset."""
    import dataclasses

    from conceptmaster.benchmarks import random_base
    from conceptmaster.engine.checkpoints.source import Choices, open_source
    from conceptmaster.engine.presets import preset

    config = preset("magref-14b")
    sizes = {"num_attention_heads": 1, "text_dim": 24, "freq_dim": 16, "ffn_dim": 64, "num_layers": 2}
    text = {"vocab_size": 320, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    config = dataclasses.replace(
        config,
        transformer=dataclasses.replace(config.transformer, added_kv_proj_dim=128, **sizes),
        text_encoder=config.text_encoder | text,
        image_encoder=config.image_encoder | {"num_hidden_layers": 2, "intermediate_size": 64},
        vae=config.vae | {"base_dim": 16, "dim_mult": [1, 1, 2, 2], "num_res_blocks": 1},
    )
    random_base.write_base(config, tmp_path / "base", layout=layout)
    source = open_source(tmp_path / "base", Choices((64, 48), 9))
    assert source.model.config.concept.given == "canvas" and source.sampling.solver == "unipc_wan"
    assert source.model.config.transformer == config.transformer
