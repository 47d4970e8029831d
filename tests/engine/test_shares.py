"""A step shared out over ranks is the step of one process: here the ranks are threads of this one."""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")

from conceptmaster.engine.dit import ConceptDiT  # noqa: E402
from conceptmaster.engine.fused import fuse  # noqa: E402
from conceptmaster.engine.parts import Part  # noqa: E402
from conceptmaster.engine.seen import Seen  # noqa: E402
from conceptmaster.engine.shares import Share, split  # noqa: E402
from conceptmaster.engine.step import Condition, DenoiseStep, condition_names  # noqa: E402


class Threads:
    """Ranks that are threads: each puts its pieces on a table, and takes those that are for it."""

    def __init__(self, size):
        self.size, self.barrier, self.table = size, threading.Barrier(size), [None] * size

    def exchange(self, rank):
        """What the rank of this number is handed."""
        return _Exchange(self, rank)


class _Exchange:
    def __init__(self, threads, rank):
        self.threads, self.rank, self.size = threads, rank, threads.size

    def turn(self, pieces):
        """See `Exchange`."""
        assert len(pieces) == self.size and pieces.is_contiguous()
        self.threads.table[self.rank] = pieces
        self.threads.barrier.wait(30)
        found = torch.stack([there[self.rank] for there in self.threads.table])
        self.threads.barrier.wait(30)
        return found


def of_all(ranks, function):
    """What function(rank) gives, by rank."""
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(function, range(ranks)))


@pytest.mark.parametrize(("tokens", "runs"), [(12, 1), (13, 1), (3, 1), (12, 3), (15, 3)])
def test_tokens_come_back_where_they_were(tokens, runs):
    x = torch.randn(2, tokens, 4, 3)
    threads = Threads(4)

    def one(rank):
        part = Part(threads.exchange(rank), tokens, runs)
        own = part.own(x)
        (heads,) = part.by_heads(own)
        torch.testing.assert_close(heads, x[:, :, rank : rank + 1], rtol=0, atol=0)
        back = part.by_tokens(heads)
        torch.testing.assert_close(part.placed(back), part.placed(own), rtol=0, atol=0)
        return part.placed(own)

    torch.testing.assert_close(sum(of_all(4, one)), x, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("ranks", "branches", "heads", "parts"),
    [
        (2, 2, 12, (2, 1)),
        (4, 2, 12, (2, 2)),
        (8, 2, 12, (2, 4)),
        (2, 3, 12, (1, 2)),
        (6, 3, 40, (3, 2)),
        (3, 1, 40, None),
        (10, 2, 12, None),
        (48, 2, 12, None),
    ],
)
def test_branches_are_parted_first(ranks, branches, heads, parts):
    assert split(ranks, branches, heads) == parts


GRIDS = {"injection": "none", "given": "grids", "max_concepts": 3, "side": 96}
MODELS = {
    "standalone": {"position_channels": 6},
    "shared_query": {"injection": "shared_query"},
    "boxes": {"mask": "boxes"},
    "boxes, shared_query": {"mask": "boxes", "injection": "shared_query"},
    "merged": {"injection": "merged"},
    "none": {"injection": "none"},
    "sample": {"injection": "none", "prediction": "sample"},
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
    "projected": GRIDS | {"guidance_rule": "projected"},
}


@pytest.fixture(scope="module")
def step_of(tiny, tiny_base, randomise):
    """`step_of(name)`: a step of random weights, in four heads, on a video of 3 by 7 by 2 patches."""
    made = {}

    def build(name):
        if name not in made:
            video = {"frames": 9, "height": 112, "width": 32}
            if name == "base":
                config = tiny_base("references", 2, **video)
                wider = dataclasses.replace(config.transformer, num_attention_heads=4, added_kv_proj_dim=48)
                config = dataclasses.replace(config, transformer=wider)
            else:
                config = tiny(**{"num_attention_heads": 4, "position_channels": 0} | video | MODELS[name])
            made[name] = DenoiseStep(randomise(ConceptDiT(config)).eval())
        return made[name]

    return build


def known_to(step, branches, seed=0):
    """What `velocity` gets, in which the last of the concepts is seen by nobody and the first branch of
    several sees none, as the torch backend makes it."""
    g = torch.Generator().manual_seed(seed)
    config = step.transformer.config
    c = config.concept
    mask = (torch.arange(c.max_concepts) < max(1, c.max_concepts - 1)).repeat(branches, 1)
    mask[: branches > 1] = False
    seen = Seen.of(mask, config)
    text = torch.randn(branches, config.text_tokens, config.transformer.text_dim, generator=g)
    tokens = torch.randn(c.max_concepts, c.tokens_per_concept, c.width, generator=g)
    kv = Condition(step.transformer)(text, seen.tokens(tokens), seen.mask)
    known = dict(zip(condition_names(c.injection), kv, strict=True))
    known["concept_mask"] = seen.mask if seen.partly or c.injection == "merged" else None
    known["text_bias"] = torch.zeros(branches, config.text_tokens).masked_fill_(
        torch.arange(config.text_tokens) > 20, -torch.inf
    )
    state = torch.randn(4, *config.denoised_shape, generator=g)
    if c.mask == "boxes":
        tokens = (state.shape[2], state.shape[3] // 2, state.shape[4] // 2)
        boxes = torch.rand(math.prod(tokens), c.max_concepts, generator=g) < 0.5  # [S,N]
        known["boxes"] = boxes[:, seen.concepts]
    if c.given == "grids":
        given = torch.zeros(1, 5, 3, 12, 12)
        for n, (height, width) in enumerate([(4, 12), (6, 10)]):
            given[0, 0, n, :height, :width] = n + 1.0
            given[0, 1:, n, :height, :width] = torch.randn(4, height, width, generator=g)
        known |= {"given": given, "kept": given[0, 0, :, ::2, ::2].flatten().nonzero().flatten()}
    elif channels := config.conditioning_channels:
        frames = {"behind": c.max_concepts, "clean": 1}.get(c.given, state.shape[1 + 1])
        known["given"] = torch.randn(1, channels, frames, *state.shape[-2:], generator=g)
        if c.given == "clean":
            known["given"][:, :1] = 1.0
    guidance = torch.tensor({1: [1.0], 2: [-2.0, 3.0], 3: [-2.0, 0.5, 2.5]}[branches])
    time, coefficients = torch.tensor([400.0]), torch.randn(4, 5, generator=g)
    coefficients[2, -1] = -0.4
    return (state, time, guidance, coefficients), {k: v for k, v in known.items() if v is not None}


def by_ranks(step, ranks, asked, known):
    """The guided velocity that `ranks` ranks make together."""
    state, time, guidance, coefficients = asked
    branches = len(guidance)
    found = split(ranks, branches, step.transformer.config.transformer.num_attention_heads)
    assert found is not None
    groups, parts = found
    threads, each = [Threads(parts) for _ in range(groups)], branches // groups

    @torch.no_grad()
    def told(rank):
        group, place = divmod(rank, parts)
        exchange = threads[group].exchange(place) if parts > 1 else None
        share = Share(group * each, (group + 1) * each, branches, exchange)
        return step.told(share, state[:1], time, **known)

    return step.guided(sum(of_all(ranks, told)), state, time, guidance, coefficients)


@torch.no_grad()
@pytest.mark.parametrize(("ranks", "branches"), [(2, 1), (4, 2), (2, 3)])
@pytest.mark.parametrize("name", [*MODELS, "base"])
def test_ranks_make_what_one_process_makes(step_of, assert_close, name, ranks, branches):
    step = DenoiseStep(fuse(copy.deepcopy(step_of(name).transformer)))
    asked, known = known_to(step, branches)
    expected = step.velocity(*asked, **known)
    scale = expected.abs().max()
    assert_close(by_ranks(step, ranks, asked, known) / scale, expected / scale)


@torch.no_grad()
def test_pictures_that_only_a_mask_parts(step_of, assert_close):
    """As in the graphs, where nobody knows beforehand which places are pictures."""
    step = step_of("grids")
    asked, known = known_to(step, 3)
    del known["kept"]
    assert_close(by_ranks(step, 6, asked, known), step.velocity(*asked, **known))
