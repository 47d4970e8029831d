"""A step: what it computes, and that nothing in it depends on what a batch holds, nor asks the device."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conceptmaster.engine.dit import MIN_SIGMA
from conceptmaster.examples.sprites.training.attention import cheapest_attention
from conceptmaster.examples.sprites.training.learning import MuonAdamW, gradient_norm
from conceptmaster.examples.sprites.training.noising import decoy_noise, normal, random_sigma
from conceptmaster.examples.sprites.training.train_model import ADAM_NAMES
from conceptmaster.examples.stickers.training import train, trainee
from conceptmaster.examples.stickers.training.batches import Pool, Told
from conceptmaster.examples.stickers.training.boxing import Boxing
from conceptmaster.examples.stickers.training.options import Dropped, Options, Supply
from conceptmaster.examples.stickers.training.studio import Studio
from conceptmaster.examples.stickers.world.tokens import END_ID

from ..small import small_config

OPTIONS = Options(supply=Supply(1, 32, 1), told=Supply(1, 8, 1))
WINDOW = slice(1, 3)
SOME_DROPPED = Dropped(0.3, 0.2, 0.1)


@pytest.fixture(scope="module")
def rings(artist):
    studio = Studio(artist, OPTIONS)
    pool, told = Pool(studio.clips, artist.config, OPTIONS.supply), Told(studio.told, OPTIONS.told_supply)
    pool.at(0)
    told.at(0)
    return pool, told


def learner(boxes=True):
    """A trainee in which nothing starts at zero."""
    torch.manual_seed(3)
    made = trainee.Trainee(train.boxed(small_config()) if boxes else small_config())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return made


def asked(rings, window=None, seed=0, dropped=SOME_DROPPED, boxes=0.5):
    """The arguments of a step."""
    pool, told = rings
    rng = np.random.default_rng(seed)
    boxing = Boxing.random(np.random.default_rng(seed + 1), 8, boxes)
    batch = pool.batch(rng, 8, dropped, window, apart=False, boxing=boxing)
    captions = told.captions(rng, 4)
    noise, sigma = normal(rng, tuple(batch.latents.shape), "cpu"), random_sigma(rng, 8)
    noise, _ = decoy_noise(batch, noise, sigma, rng, 0.5)
    return batch, captions, noise, sigma, window


def of_filled_slots(own, batch, captions, noise, sigma, window):
    """The losses, from rows that are picked by what the batch holds."""
    model, filled = own.model, batch.label_mask.any(-1)
    s = sigma[:, None, None, None, None]
    noisy = (1 - s) * batch.latents + s * noise
    mask = batch.label_mask[filled]
    visual = model.qformer(model.image_encoder(batch.pixels[filled]))
    tokens = model.dam(visual, model.text_encoder(batch.label_ids[filled], mask), mask)
    concepts = tokens.new_zeros((*filled.shape, *tokens.shape[1:]))
    concepts[filled] = tokens
    text = model.text_encoder(batch.token_ids, batch.token_mask)
    kept = []
    handle = model.transformer.blocks[own.middle].register_forward_hook(lambda *a: kept.append(a[2]))
    with trainee.only(model.transformer, window):
        told = noisy, sigma * 1000, text, concepts, batch.concept_mask
        velocity = model.transformer(*told, boxes=batch.boxes)
    handle.remove()
    weight = 1 + 3 * batch.coverage.sum(1, keepdim=True).clamp(max=1)
    error = (velocity - (noise - batch.latents)).square() * weight * s.clamp(min=MIN_SIGMA).square()
    target = F.avg_pool3d(batch.coverage.flatten(0, 1)[:, None], (1, 2, 2)).flatten(1)  # [B*N,S]
    shown = batch.concept_mask.flatten()
    logits = own.layout(kept[0], concepts).flatten(0, 1)
    difference = own.portrait(visual) - batch.portraits[filled]
    most, which = (target.unflatten(0, filled.shape) * batch.concept_mask[..., None]).max(1)
    rows, columns = torch.nonzero(most > 0.4, as_tuple=True)
    faces = F.avg_pool2d(batch.portraits.flatten(0, 1), 4).unflatten(0, filled.shape)
    wanted = faces[rows, which[rows, columns]].flatten(1)
    return {
        "flow": error.mean() / weight.mean(),
        "layout": F.binary_cross_entropy_with_logits(logits[shown], target[shown]),
        **of_captions(own, captions),
        "scenery": of_background(own, batch, text),
        "portrait": difference.abs().mean() + difference.square().mean(),
        "look": (own.look(kept[0][rows, columns]) - wanted).square().mean(),
        "pose": (own.pose(kept[0][rows, columns]) - poses_of(batch, rows, columns, which)).square().mean(),
    }


def poses_of(batch, rows, columns, which):
    """Turn, size and place in each of four frames, of the concept that is most of a token."""
    high, wide = (n // 2 for n in batch.coverage.shape[3:])
    found = []
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        frame, place = divmod(column, high * wide)
        x, y, size, turn = batch.track[row, which[row, column], frame].T.double()  # [4] each
        down, across = (place // wide + 0.5) * 64 / high, (place % wide + 0.5) * 64 / wide
        each = [torch.sin(turn), torch.cos(turn), 2 * torch.log2(size / 10), (x - across) / 8, (y - down) / 8]
        found.append(torch.stack(each, -1).flatten().float())
    return torch.stack(found)


def of_background(own, batch, text):
    embedded = own.model.transformer.condition_embedder.text_embedder(text)
    free = batch.coverage.sum(1) <= 0.05  # [B,F,H,W]
    wanted, told = torch.zeros(len(text), *batch.latents.shape[1::2][:2]), []
    seen = torch.zeros(len(text), 1, wanted.shape[2])
    for clip in range(len(text)):
        told.append(own.scenery(embedded[clip][batch.token_mask[clip]].mean(0)))
        for row in range(wanted.shape[2]):
            if (bare := free[clip, :, row]).any():
                wanted[clip, :, row] = batch.latents[clip, :, :, row][:, bare].mean(1)
                seen[clip, 0, row] = 1
    error = (torch.stack(told).view_as(wanted) - wanted).square() * seen
    return error.mean() / ((wanted - wanted.mean(0)).square() * seen).mean()


def of_captions(own, captions):
    filled = captions.label_mask.any(-1)
    ids, mask = captions.label_ids[filled], captions.label_mask[filled]
    words = mask & (ids != END_ID)
    named = (own.model.text_encoder(ids, mask) * words[..., None]).sum(1) / words.sum(1, keepdim=True)
    looked_for = named.new_zeros((*filled.shape, named.shape[-1]))
    looked_for[filled] = named
    text = own.model.text_encoder(captions.token_ids, captions.token_mask)
    where = own.story.where(looked_for, text, captions.token_mask)
    logits = own.story(text, where)[filled]
    target = F.avg_pool3d(captions.coverage.flatten(0, 1)[:, None], (1, 2, 2)).flatten(1)
    embedded = own.model.transformer.condition_embedder.text_embedder(text)
    motion = own.motion(where @ embedded)[filled].log_softmax(-1)
    return {
        "story": F.binary_cross_entropy_with_logits(logits, target[filled.flatten()]),
        "motion": -motion[torch.arange(len(motion)), captions.motion[filled]].mean(),
    }


def gradients(own, losses):
    weights = {"flow": 5.0, "layout": 4.0, "story": 0.5, "scenery": 1.0, "motion": 1.0}
    weights |= {"portrait": 2.0, "look": 3.0, "pose": 3.0}
    own.zero_grad()
    sum(weights[name] * losses[name] for name in weights).backward()
    return {name: p.grad.clone() for name, p in own.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_step_is_what_the_filled_slots_alone_give(window, rings, assert_close):
    own, arguments = learner(), asked(rings, window)
    losses = own(*arguments)
    wanted = of_filled_slots(own, *arguments)
    got, expected = gradients(own, losses), gradients(own, wanted)
    assert losses.keys() - wanted.keys() == {"total"}
    for name in wanted:
        assert_close(losses[name], wanted[name])
    assert got.keys() == expected.keys()
    for name in got:  # the largest are of order one
        assert_close(got[name], expected[name])


@pytest.mark.parametrize("window", [None, WINDOW])
def test_where_no_clip_has_boxes_the_losses_are_to_the_bit_those_of_a_model_without(window, rings):
    arguments = asked(rings, window, boxes=0.0)
    with cheapest_attention("cpu"):
        found, usual = (learner(boxes)(*arguments) for boxes in (True, False))
        some = learner()(*asked(rings, window, boxes=1.0))
    assert found.keys() == usual.keys() and all(torch.equal(found[name], usual[name]) for name in usual)
    assert some["flow"] != usual["flow"]
    assert learner().state_dict().keys() == learner(False).state_dict().keys()


def test_clips_without_boxes_are_what_they_are_beside_others_with_them(rings):
    """To the bit: what is told of them, and the velocity."""
    own = learner()
    one, other = asked(rings, boxes=0.0), asked(rings, boxes=0.5)
    boxed = ~other[0].boxes.flatten(1).all(1) | (one[0].token_ids != other[0].token_ids).any(1)
    assert boxed.any() and not boxed.all()
    with torch.no_grad(), cheapest_attention("cpu"):
        noisy = torch.randn(one[0].latents.shape, generator=torch.Generator().manual_seed(0))
        usual, found = (own.velocity(batch, noisy, one[3])[0] for batch in (one[0], other[0]))
    assert torch.equal(usual[~boxed], found[~boxed])
    for name, value in vars(one[0]).items():
        if name not in ("boxes", "filled"):
            assert torch.equal(value[~boxed], getattr(other[0], name)[~boxed]), name


def test_a_batch_in_which_nothing_is_shown_asks_for_nothing(rings):
    own, arguments = learner(), asked(rings, dropped=Dropped(1, 0, 0))
    losses = own(*arguments)
    assert losses["layout"] == losses["look"] == losses["pose"] == 0 and losses["flow"] > 0
    losses["total"].backward()
    assert all(p.grad.isfinite().all() for p in own.parameters() if p.grad is not None)


def compiled(backend):
    torch.compiler.reset()
    own = learner()
    own.compile_parts(backend)
    return own


@pytest.mark.slow
def test_the_parts_compile_whole_and_once_for_batches_of_one_kind(rings, assert_close):
    own, plain = compiled("aot_eager"), learner()
    for seed, limit in ((0, False), (1, True)):
        arguments = asked(rings, WINDOW, seed)
        with torch._dynamo.config.patch(error_on_recompile=limit), cheapest_attention("cuda"):
            losses = own(*arguments)
            got = gradients(own, losses)
        expected = gradients(plain, plain(*arguments))
        assert all(torch.allclose(got[name], expected[name], atol=1e-4) for name in expected)


class NoQuestions(TorchDispatchMode):
    """Refuses what a GPU would be waited for."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.ASKING), f"{func} asks the device"
        if "aten.index." in str(func) or "index_put" in str(func):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask picks rows"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [None, WINDOW])
def test_nothing_in_a_step_asks_the_device(window, rings, monkeypatch):
    """Neither a batch, nor losses and gradients, nor the optimizer."""
    from transformers import masking_utils

    own = learner()
    # Where nothing is compiled transformers looks whether anything is masked.
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *a: True)
    optimizer = MuonAdamW(own.named_parameters(), 0.01, 0.001, adam_names=ADAM_NAMES)
    with NoQuestions():
        own(*asked(rings, window))["total"].backward()
        gradient_norm(own.parameters(), 2.0)
        optimizer.step()
