"""Bernini-R: videos of references on grids of their own, guided by projection, against its recipe."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

PREFIX = "You are a helpful assistant specialized in subject-to-video generation."
PROMPT = "the thing 0 &amp; the thing 1\n, near a thing 2 , a thing 3, thing 4 and thing 5 run up"
SAID = (
    "the thing 0 from image0 & the thing 1 from image1 , near a thing 2 from image2 , a thing 3 from image3"
)
SAID += ", thing 4 from image4 and thing 5 from image5 run up"
NEGATIVE = "the rain"
WIDTH, HEIGHT, FRAMES, STEPS, SIDE = 64, 48, 5, 3, 96
OMEGA_IMG, OMEGA_TXT = 4.5, 4.0
SIZE = ("--size", f"{WIDTH}x{HEIGHT}", "--frames", FRAMES, "--reference-side", SIDE)
LATENT = (4, 2, HEIGHT // 8, WIDTH // 8)


def picture(seed, width, height):
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [picture(0, 64, 48), picture(1, 90, 50), picture(2, 33, 301), picture(3, 200, 147)]
PICTURES += [picture(4, 5, 3), picture(5, 96, 96)]


@pytest.fixture(scope="module")
def parts(wan_parts):
    """Tiny parts whose references, and the clip of whose guidance, show in the pixels; `parts(2)`: two
    experts."""

    def build(experts=1):
        import diffusers

        parts = wan_parts()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            for index in range(experts):
                plain = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
                made = diffusers.WanTransformer3DModel(**plain).eval()
                for parameter in made.parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
                torch.nn.init.normal_(made.patch_embedding.weight, std=0.6)
                for block in made.blocks:  # where each token is shows, too
                    torch.nn.init.normal_(block.attn1.norm_q.weight, std=2.0)
                    torch.nn.init.normal_(block.attn1.norm_k.weight, std=2.0)
                    torch.nn.init.normal_(block.attn1.to_v.weight, std=1.0)
                    torch.nn.init.normal_(block.attn1.to_out[0].weight, std=1.0)
                torch.nn.init.normal_(made.proj_out.weight, std=2.0)
                parts["transformer" + "_2" * index] = made
        return parts

    return build


def save(parts, folder, boundary=None):
    for name in ("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler"):
        if name in parts:
            parts[name].save_pretrained(folder / name)
    root = {"model_type": "bernini_renderer", "architectures": ["BerniniRendererModel"], "shift": 3.0}
    root |= {
        "wan22_base": "ByteDance/Bernini-R-1.3B-Diffusers",
        "max_sequence_length": 512,
        "use_unipc": True,
    }
    root |= {"skip_transformer_1": False, "skip_transformer_2": boundary is None}
    root |= {"switch_dit_boundary": boundary or 0, "use_src_id_rotary_emb": True}
    (folder / "config.json").write_text(json.dumps(root))
    return folder


@pytest.fixture(scope="module")
def one(parts, tmp_path_factory):
    """The parts of a model of one transformer, and its folder, which is not to be changed."""
    made = parts()
    return made, save(made, tmp_path_factory.mktemp("bernini") / "tiny-bernini")


@pytest.fixture(scope="module")
def two(parts, tmp_path_factory):
    """Of two experts."""
    made = parts(2)
    return made, save(made, tmp_path_factory.mktemp("bernini") / "tiny-bernini-14b", 0.875)


@pytest.fixture(scope="module")
def bundles(one, tmp_path_factory):
    """`bundles(references, branches)`: a bundle, with graphs if so asked."""
    from conceptmaster.cli import main

    made = {}

    def build(references=4, branches=3, graphs=False):
        key = (references, branches, graphs)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundles") / "tiny-bernini"
            args = ["export", one[1], "--output", made[key], *SIZE, "--references", references, "--quiet"]
            args += ["--branches", branches, *([] if graphs else ["--no-graphs"])]
            assert main([str(arg) for arg in args]) == 0
        return made[key]

    return build


# The recipe, restated: bernini/pipeline.py, data_utils.py, models/wan_diffusion.py.


def kept_size(width, height, most):
    def nearest(value):
        return max(16, int(round(value / 16) * 16))

    scale = min(most / max(width, height), 1.0)
    scale = max(scale, 1 / min(width, height))
    new = [nearest(round(side * scale)) for side in (width, height)]
    if max(new) > most:
        scale = most / max(new)
        new = [nearest(round(side * scale)) for side in new]
    return tuple(new)


@torch.no_grad()
def reference_latents(vae, image, side=SIDE):
    from PIL import Image

    image = image.convert("RGB")
    size = kept_size(*image.size, side)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)
    raw = vae.encode(((pixels - 0.5) / 0.5)[None, :, None]).latent_dist.mode()
    mean, std = (torch.tensor(vae.config[n]).view(1, -1, 1, 1, 1) for n in ("latents_mean", "latents_std"))
    return (raw - mean) / std


@torch.no_grad()
def embedded(parts, text):
    tokens = parts["tokenizer"](
        text, padding="max_length", max_length=512, truncation=True, return_tensors="pt"
    )
    hidden = parts["text_encoder"](tokens.input_ids, tokens.attention_mask).last_hidden_state
    count = int(tokens.attention_mask.sum())
    return torch.cat((hidden[:, :count], hidden.new_zeros(1, 512 - count, hidden.shape[2])), dim=1)


def normalised(d, base, eta=0.5, threshold=50.0):
    axes = [-1, -2, -4]
    d = d * torch.minimum(torch.ones_like(d), threshold / d.norm(p=2, dim=axes, keepdim=True))
    unit = torch.nn.functional.normalize(base.double(), dim=axes)
    along = (d.double() * unit).sum(dim=axes, keepdim=True) * unit
    return (d.double() - along).to(d.dtype) + eta * along.to(d.dtype)


def old_grid(steps, shift):
    """sigmas and times of diffusers before 0.37."""
    alphas = np.linspace(1, 1 / 1000, steps + 1)
    sigmas = 1.0 - alphas
    sigmas = np.flip(shift * sigmas / (1 + (shift - 1) * sigmas))[:-1].copy()
    return sigmas.astype(np.float32), (sigmas * 1000).astype(np.int64)


@torch.no_grad()
def expected(
    parts,
    forward,
    images,
    noise,
    said,
    mode=3,
    boundary=0.0,
    image_scale=OMEGA_IMG,
    text_scale=OMEGA_TXT,
    side=SIDE,
):
    """Frames in 0..255, [F,height,width,3]. mode: how many branches."""
    import diffusers
    from diffusers.video_processor import VideoProcessor

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    sigmas, times = old_grid(STEPS, 5.0)
    scheduler.set_timesteps(STEPS)
    scheduler.sigmas = torch.cat((torch.from_numpy(sigmas), torch.zeros(1)))
    scheduler.timesteps = torch.from_numpy(times)
    prompt, negative = embedded(parts, PREFIX + said), embedded(parts, NEGATIVE)
    pictures = [reference_latents(parts["vae"], image, side) for image in images]
    count = len(images)
    sources = [float(n) for n in range(1, count + 1)]
    if count > 5:
        sources = torch.linspace(1.0, 5.0, count).tolist()
    x, longest, switched = torch.from_numpy(noise)[None], 0.0, False
    for index, t in enumerate(scheduler.timesteps):
        if t < boundary * 1000 and not switched:
            switched, image_scale, text_scale = True, 0.8 * image_scale, 0.8 * text_scale
        transformer = parts["transformer_2" if switched else "transformer"]
        seen = (pictures, sources)
        told = {1: [(*seen, prompt)], 2: [([], [], negative), (*seen, prompt)]}
        told[3] = [([], [], negative), (*seen, negative), (*seen, prompt)]
        sigma = scheduler.sigmas[index]
        each = [x - sigma * forward(transformer, x, *known[:2], t[None], known[2]) for known in told[mode]]
        guided = each[0]
        scales = {2: [text_scale], 3: [image_scale, text_scale]}.get(mode, [])
        for scale, before, after in zip(scales, each, each[1:], strict=False):
            guided = guided + scale * normalised(after - before, after)
            longest = max(longest, (after - before).norm(p=2, dim=[-1, -2, -4]).max().item())
        x = scheduler.step((x - guided) / sigma, t, x, return_dict=False)[0]
    assert mode == 1 or longest > 50  # so that the clip shows
    vae = parts["vae"]
    mean, std = (torch.tensor(vae.config[n]).view(1, -1, 1, 1, 1) for n in ("latents_mean", "latents_std"))
    video = vae.decode(x * std + mean, return_dict=False)[0]
    return VideoProcessor(vae_scale_factor=8).postprocess_video(video, output_type="np")[0] * 255


def held(found, frames):
    assert found.shape == frames.shape and found.dtype == np.uint8
    assert frames.std() > 5 and (frames % 255 != 0).mean() > 0.5
    assert abs(found - frames).max() <= 1.0


def noise_for(seed=0, latent=LATENT):
    return np.random.default_rng(seed).standard_normal(latent, np.float32)


def said_of(count):
    """SAID of the first pictures alone."""
    said = SAID
    for number in range(count, 6):
        said = said.replace(f" from image{number}", "")
    return said


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_references_give_the_recipes_frames(one, with_own_grids, bundles, generated, count):
    """With PyTorch; of three, with ONNX Runtime as well, by a bundle that takes more."""
    (parts, folder), said = one, said_of(count)
    noise, images = noise_for(count), PICTURES[-count:]
    frames = expected(parts, with_own_grids, images, noise, said)
    held(generated(bundles(max(count, 4)), images, noise, "--backend", "torch", "--weights", folder), frames)
    if count == 3:
        assert abs(frames - expected(parts, with_own_grids, images[::-1], noise, said)).max() > 2
        held(generated(bundles(4, graphs=True), images, noise), frames)


@pytest.mark.parametrize("branches", [1, 2])
def test_fewer_branches(one, with_own_grids, bundles, generated, branches):
    """One difference, of neither to both, or none; with the scale of the caption."""
    (parts, folder), images, noise = one, PICTURES[1:3], noise_for(branches)
    frames = expected(parts, with_own_grids, images, noise, said_of(2), branches)
    held(generated(bundles(4, branches), images, noise, "--backend", "torch", "--weights", folder), frames)


def test_two_experts_and_scales(two, with_own_grids, generated, command, tmp_path):
    """Both scales, as its program has them or as they are asked for, times 0.8 for low noise."""
    (parts, folder), images, noise = two, PICTURES[2:4], noise_for(9)
    args = (
        "export",
        folder,
        "--output",
        tmp_path / "two",
        *SIZE,
        "--references",
        2,
        "--no-graphs",
        "--quiet",
    )
    code, _, err = command(*args)
    assert code == 0, err
    for asked, scales in (
        ((), (4.5, 4.0)),
        (("--guidance", 3.0, "--concept-guidance", 6.0), (6.0, 3.0)),
        (("--guidance", 2.0), (2.0, 2.0)),
    ):
        frames = expected(parts, with_own_grids, images, noise, said_of(2), 3, 0.875, *scales)
        held(
            generated(tmp_path / "two", images, noise, "--backend", "torch", "--weights", folder, *asked),
            frames,
        )
    code, out, _ = command("inspect", tmp_path / "two")
    assert (
        code == 0
        and "transformer from noise 1 to 0.875, guidance 4; transformer_2 below, guidance 3.2" in out
    )


def test_what_the_bundle_is(one, bundles, command):
    from conceptmaster.runtime.bundle_format.manifest import load

    bundle, folder = bundles(4, graphs=True), one[1]
    manifest = load(bundle)
    names = {"text_encoder", "condition", "denoise", "encode_first", "decode_first", "decode"}
    assert set(manifest.graphs) == names
    assert (manifest.format, manifest.concepts, manifest.fps, manifest.guided_first) == (
        6,
        4,
        16.0,
        "concepts",
    )
    assert (manifest.prompt_prefix, manifest.picture_name) == (PREFIX, "image")
    assert manifest.denoised == manifest.shapes.latent == LATENT
    assert manifest.graphs["denoise"].input("given").shape == (1, 5, 4, SIDE // 8, SIDE // 8)
    assert manifest.graphs["encode_first"].input("area").shape == (1, 1, 1, SIDE // 8, SIDE // 8)
    told = manifest.defaults
    assert (told.solver, told.steps, told.shift) == ("unipc_wan", 40, 5.0)
    assert (told.guidance, told.concept_guidance) == (4.0, 4.5) and told.negative.startswith("色调艳丽，过曝")
    code, out, _ = command("inspect", bundle)
    assert code == 0 and "1 to 4, each of its own size, up to 96 pixels a side" in out
    assert f"behind {PREFIX!r}; the pictures are image0, image1, …" in out
    code, out, err = command("verify", bundle, "--source", folder)
    assert (code, err) == (0, "") and out.count("ok") == len(names)


def test_what_cannot_be_asked_for(one, bundles, command, tmp_path):
    picture(0, 20, 20).save(tmp_path / "a.png")

    def refused(message, prompt, *labels):
        concepts = [x for label in labels for x in ("--concept", label, tmp_path / "a.png")]
        args = ("--prompt", prompt, *concepts, "--output", tmp_path / "a.npy", "--steps", 1)
        more = ("--backend", "torch", "--weights", one[1])
        code, _, err = command("generate", "--bundle", bundles(4), *args, *more)
        last = err.splitlines()[-1]  # behind what is planned
        assert code == 2 and "error:" in last and message in last, err

    refused("give it 1 to 4 pictures, each with", "a cat runs")
    refused("takes at most 4", "a b c d e", *"abcde")
    refused("does not say what the picture of 'cat' shows", "a dog runs", "cat")
    refused("names image1, but the pictures are image0", "image1 runs", "cat")
    refused("the prompt, with its prefix and the pictures' names, takes", "cat " + "dog " * 505, "cat")


def change(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "bernini"},
            "the model is a 'bernini', which the engine does not have: of Bernini it has",
        ),
        ({"model_type": "other_video"}, "the model is a 'other_video', which the engine does not have"),
        ({"use_src_id_rotary_emb": False}, "use_src_id_rotary_emb must be True, got False"),
        ({"max_trained_src_id": 8}, "max_trained_src_id must be 5, got 8"),
        ({"interpolate_src_id": False}, "interpolate_src_id must be True"),
        ({"use_unipc": False}, "use_unipc must be True"),
        ({"skip_transformer_1": True}, "skip_transformer_1 must be False"),
        ({"skip_transformer_2": 1}, "skip_transformer_2 must be true or false"),
        ({"skip_transformer_2": False}, "switch_dit_boundary must be between 0 and 1, got 0"),
        (
            {"skip_transformer_2": False, "switch_dit_boundary": 0.9},
            "config.json does not say skip_transformer_2",
        ),
    ],
)
def test_an_odd_folder_is_refused_by_name(one, command, tmp_path, changes, message):
    own = tmp_path / "own"
    shutil.copytree(one[1], own)
    change(own / "config.json", **changes)
    code, out, err = command("export", own, "--output", tmp_path / "out", *SIZE, "--no-graphs")
    assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err


def test_what_can_be_chosen(one, wan_folder, command, tmp_path):
    for place, options, message in (
        (one[1], ("--references", 0), "references must be 1 to 64, got 0"),
        (one[1], ("--references", 65), "references must be 1 to 64, got 65"),
        (one[1], ("--reference-side", 100), "a multiple of 16 up to 4096; the nearest that works is 96"),
        (one[1], ("--reference-side", 0), "the nearest that works is 16"),
        (wan_folder, ("--reference-side", 96), "is no Bernini-R, whose references alone keep their own size"),
    ):
        args = ("--output", tmp_path / "out", *SIZE[:4], *options, "--no-graphs")
        code, out, err = command("export", place, *args)
        assert (code, out) == (2, "") and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize("changes", [{"image_dim": 8}, {"_class_name": "WanVACETransformer3DModel"}])
def test_another_transformer_than_its_own(one, command, tmp_path, changes):
    own = tmp_path / "own"
    shutil.copytree(one[1], own)
    change(own / "transformer" / "config.json", **changes)
    code, _, err = command("export", own, "--output", tmp_path / "out", *SIZE, "--no-graphs")
    assert code == 2 and err.count("\n") == 1 and str(own / "transformer") in err, err


@pytest.mark.parametrize("experts", [1, 2])
def test_without_its_file_a_name_is_refused(one, two, command, tmp_path, experts):
    own = tmp_path / "Bernini-R"
    shutil.copytree((one, two)[experts - 1][1], own)
    (own / "config.json").unlink()
    index = {"_class_name": "WanPipeline"} | ({"boundary_ratio": 0.875} if experts == 2 else {})
    (own / "model_index.json").write_text(json.dumps(index))
    for options in ((), ("--references", 2)):
        args = ("--output", tmp_path / "out", *SIZE[:4], *options, "--no-graphs")
        code, out, err = command("export", own, *args)
        assert (code, out) == (2, "") and err.count("\n") == 1, err
        assert "is told by a config.json with model_type 'bernini_renderer'" in err
    plain = own.rename(tmp_path / "wan")
    assert command("export", plain, "--output", tmp_path / "out", *SIZE[:4], "--no-graphs")[0] == 0


def test_a_transformer_of_its_folder_in_another_base(one, wan_folder, command, tmp_path):
    own = tmp_path / "Bernini-R"
    shutil.copytree(one[1], own)
    args = ("--output", tmp_path / "out", *SIZE[:4], "--no-graphs")
    for given in (own / "transformer", next((own / "transformer").glob("*.safetensors"))):
        code, _, err = command("export", wan_folder, "--transformer", given, *args)
        assert code == 2 and "is called Bernini" in err, err


def test_the_second_transformer_of_a_folder_that_skips_it_is_not_read(two, tmp_path):
    from conceptmaster.engine.checkpoints.source import Choices, open_source

    own = tmp_path / "own"
    shutil.copytree(two[1], own)
    change(own / "config.json", skip_transformer_2=True, switch_dit_boundary=0)
    (own / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.875, "transformer_2": ["a", "b"]}))
    source = open_source(own, Choices((64, 48), 5))
    assert source.model.transformer_2 is None and source.model.config.boundary is None
    assert source.model.config.concept.side == 848 and source.model.config.concept.max_concepts == 4
    assert not any(name.startswith("transformer_2") for name in source.origin.files)
    assert "config.json" in source.origin.files


@pytest.mark.slow
def test_the_published_side(one, with_own_grids, generated, command, tmp_path):
    """Where nothing is said: large pictures have a longer side of 848 pixels."""
    (parts, folder), images, noise = one, [picture(8, 1000, 700), picture(9, 300, 130)], noise_for(5)
    args = ("export", folder, "--output", tmp_path / "large", *SIZE[:4], "--no-graphs", "--quiet")
    code, _, err = command(*args)
    assert code == 0, err
    frames = expected(parts, with_own_grids, images, noise, said_of(2), side=848)
    held(generated(tmp_path / "large", images, noise, "--backend", "torch", "--weights", folder), frames)


@pytest.mark.slow
def test_more_of_it_with_graphs(one, with_own_grids, generated, command, tmp_path):
    """Few words, and tiles; another size."""
    (parts, folder), images = one, PICTURES[:2]
    noise = noise_for(4, (4, 2, 10, 4))
    args = (
        "export",
        folder,
        "--size",
        "32x80",
        "--frames",
        5,
        "--reference-side",
        64,
        "--references",
        3,
        "--quiet",
    )
    frames = expected(parts, with_own_grids, images, noise, said_of(2), side=64)
    for name, more in (("short", ("--text-tokens", 500)), ("tiles", ("--tile", "32x32"))):
        code, _, err = command(*args, "--output", tmp_path / name, *more)
        assert code == 0, err
        found = generated(tmp_path / name, images, noise)
        if name == "short":
            held(found, frames)
        assert found.shape == frames.shape


@pytest.mark.slow
def test_eight_bits(wan_parts, generated, command, tmp_path):
    """Of weights that are not drawn to show every rounding."""
    folder = save(wan_parts(), tmp_path / "plain")
    args = ("export", folder, "--output", tmp_path / "int8", *SIZE, "--references", 2, "--int8", "--quiet")
    code, _, err = command(*args)
    assert code == 0, err
    assert generated(tmp_path / "int8", PICTURES[:2], noise_for(1)).std() > 5


@pytest.mark.slow
def test_weights_on_disk(one, with_own_grids, generated, command, tmp_path, monkeypatch):
    """Graphs of a larger side than those that they are compared at."""
    from conceptmaster.engine.checkpoints import lazy_weights
    from conceptmaster.export.onnx_graphs import weights_16bit

    monkeypatch.setattr(lazy_weights, "MIN_ELEMENTS", 64)
    monkeypatch.setattr(weights_16bit, "SMALLEST", 64)
    (parts, folder), images, noise = one, PICTURES[2:4], noise_for(3)
    more = ("--reference-side", 160, "--references", 2, "--output", tmp_path / "disk", "--quiet")
    code, out, err = command("export", folder, *SIZE[:4], *more)
    assert code == 0 and out.count("(small video)") == 6, err
    monkeypatch.undo()
    frames = expected(parts, with_own_grids, images, noise, said_of(2), side=160)
    held(generated(tmp_path / "disk", images, noise), frames)
