"""Hopper's kernel, run by the emulator, against the reference in float64; which kernel is chosen."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from conceptmaster.kernels import cross_attention_choice as choice  # noqa: E402
from conceptmaster.kernels import cross_attention_hopper as hopper  # noqa: E402
from conceptmaster.kernels.common import launches_to  # noqa: E402
from conceptmaster.kernels.cross_attention import (  # noqa: E402
    attention,
    decoupled_cross_attention_reference,
)
from tests.kernels.gluon_emulator import Emulator, Stuck  # noqa: E402


def tensors(batch, queries, text, concepts, heads, width, dtype=torch.bfloat16, seed=0):
    """q, text, concepts, mask, inverse rms, bias; the mask's first row is all False."""
    g = torch.Generator().manual_seed(seed)

    def new(tokens):
        return torch.randn(batch, tokens, heads, width, generator=g).to(dtype)

    text_keys = (new(text), new(text)) if text else None
    concept_keys = (new(concepts), new(concepts)) if concepts else None
    mask = torch.rand(batch, max(concepts, 1), generator=g) < 0.6
    mask[0], mask[1:, 0] = False, True
    bias = torch.randn(batch, max(text, 1), generator=g)
    bias[:, text * 2 // 3 + 1 :] = -torch.inf
    if concepts > 100:
        mask[1, :70] = False  # a first block without any key
    return new(queries), text_keys, concept_keys, mask, 0.5 + torch.rand(batch, queries, generator=g), bias


def emulated(q, *others, programs=2, seed=0, **options):
    out = torch.full_like(q, torch.nan)
    with launches_to(Emulator(seed, **options)):
        return hopper.hopper_attention_triton(out, q, *others, programs=programs)


def exactly(q, text, concepts, mask, rms, bias):
    q = q.double() if rms is None else q.double() * rms.double()[:, :, None, None]
    wide = {name: [t.double() for t in keys] for name, keys in (("t", text), ("c", concepts)) if keys}
    bias = None if bias is None else bias.double()
    if text and concepts:
        return decoupled_cross_attention_reference(q, *wide["t"], *wide["c"], mask, None, bias)
    return attention(q, *wide["t"], bias=bias) if text else attention(q, *wide["c"], mask)


CASES = {
    # B, S, T, C, A, E, masked, rms, biased, programs
    "ring, ragged": (2, 200, 300, 20, 1, 64, True, True, False, 2),
    "ring, whole blocks": (1, 256, 576, 64, 1, 64, False, False, False, 1),
    "resident, heads change": (2, 130, 80, 33, 3, 64, True, True, True, 2),
    "resident, wide": (2, 70, 80, 16, 1, 128, False, False, True, 2),
    "ring, wide, blocks hidden by the bias": (2, 129, 400, 7, 1, 128, True, False, True, 1),
    "text alone": (2, 64, 20, 0, 1, 64, False, True, True, 3),
    "concepts alone": (3, 65, 0, 150, 2, 64, True, False, False, 2),
    "one key": (1, 3, 1, 1, 1, 64, False, False, False, 1),
}


def given_for(case):
    *shape, masked, with_rms, biased, _ = CASES[case]
    q, text, concepts, mask, rms, bias = tensors(*shape)
    return q, text, concepts, mask if masked else None, rms if with_rms else None, bias if biased else None


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_the_reference(case, seed, assert_close):
    given = q, text, _, mask, *_ = given_for(case)
    out = emulated(*given, programs=CASES[case][-1], seed=seed)
    assert_close(out, exactly(*given), "bfloat16")
    if mask is not None:  # no concepts in the first row: exactly the text, exactly zero without any
        alone = emulated(q, text, None, None, *given[4:]) if text else torch.zeros_like(q)
        assert torch.equal(out[0], alone[0])


def test_strides_are_followed(assert_close):
    q, text, concepts, *_ = tensors(2, 70, 20, 9, 2, 64, torch.float16)
    fused = torch.cat((torch.full_like(q, torch.nan), q), dim=2)[:, :, 2:]  # [B,S,A,E], out of a wider one
    stacked = torch.stack(text, dim=1).unbind(1)
    assert not fused.is_contiguous() and not stacked[0].is_contiguous()
    assert hopper.takes(fused, stacked, concepts)
    out = torch.full_like(q, torch.nan)
    with launches_to(Emulator()):
        hopper.hopper_attention_triton(out, fused, stacked, concepts)
    assert_close(out, exactly(q, text, concepts, None, None, None), "float16")


def test_the_launch_is_of_descriptors_and_tensors(monkeypatch):
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append((grid, arguments, options))

    monkeypatch.setattr(hopper, "hopper_attention_kernel", Kernel())
    q, text, concepts, mask, *_ = tensors(2, 70, 20, 9, 2, 64)
    hopper.hopper_attention_triton(torch.empty_like(q), q, text, concepts, mask, programs=114)
    [(grid, arguments, options)] = launched
    assert grid == (114,) and options["num_warps"] == 4 and options["maxnreg"] == hopper.REGISTERS
    assert [d.shape for d in arguments[:3]] == [[2, 70, 128], [2, 70, 128], [2, 20, 128]]
    assert arguments[9:14] == (2, 70, 2, 20, 9)  # B, S, A, T, C


def test_what_the_kernel_does_not_take():
    q, text, concepts, *_ = tensors(2, 5, 3, 4, 2, 64)
    assert hopper.takes(q, text, concepts) and hopper.takes(q, None, concepts)
    assert not hopper.takes(q.float(), text, concepts)  # dtype
    assert not hopper.takes(q[..., :32], text, concepts)  # width
    assert not hopper.takes(q.transpose(1, 2).contiguous().transpose(1, 2), text, concepts)  # heads apart
    assert not hopper.takes(q[:1].expand(2, -1, -1, -1), text, concepts)  # a step of zero
    many = tensors(2, 5, 3, 65, 2, 64)
    assert not hopper.takes(*many[:3]) and hopper.takes(many[0], None, many[2])


def test_the_emulator_tells_a_deadlock():
    q, text, concepts, *_ = tensors(1, 300, 300, 20, 1, 64)
    with pytest.raises(Stuck, match="wait for each other"):
        emulated(q, text, concepts, programs=1, arrivals=False)


@pytest.fixture
def on_hopper(monkeypatch):
    """Makes the choice believe that it runs on Hopper; gives the names of the kernels that are launched."""
    launched = []

    def run(kernel, *arguments, **options):
        launched.append(kernel.__name__)
        Emulator()(kernel, *arguments, **options)

    def plain(out, *given):  # in the place of the kernel, which has its own tests
        launched.append(PLAIN)
        return out.copy_(exactly(*given))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    several = lambda device: SimpleNamespace(multi_processor_count=2)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", several)
    for name, value in {
        "FEW_QUERIES": 0,
        "_await": lambda device: None,
        "_proven": set(),
        "_refused": set(),
        "cross_attention_triton": plain,
    }.items():
        monkeypatch.setattr(choice, name, value)
    monkeypatch.delenv(choice.PLAIN, raising=False)
    with launches_to(run):
        yield launched


PLAIN, HOPPER = "cross_attention_kernel", "hopper_attention_kernel"


def test_hoppers_kernel_is_chosen_once_it_has_agreed(on_hopper, assert_close):
    given = tensors(2, 70, 20, 9, 1, 64)
    assert_close(choice.cross_attention_cuda(*given), exactly(*given), "bfloat16")
    assert on_hopper == [PLAIN, HOPPER, HOPPER]  # the two side by side, then the call
    choice.cross_attention_cuda(*given)
    assert on_hopper[3:] == [HOPPER]


def test_more_concepts_than_a_block_beside_text_are_a_launch_of_their_own(on_hopper, assert_close):
    given = tensors(2, 70, 20, 130, 1, 64)
    assert_close(choice.cross_attention_cuda(*given), exactly(*given), "bfloat16")
    assert on_hopper == [PLAIN, HOPPER, HOPPER] * 2


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_a_kernel_that_fails_is_told_once_and_not_used(on_hopper, fault, monkeypatch, caplog, assert_close):
    def failing(out, *given, **options):
        if fault == "raises":
            raise RuntimeError("ptxas: no\nmore lines")
        return out.zero_()

    monkeypatch.setattr(hopper, "hopper_attention_triton", failing)
    given = tensors(2, 70, 20, 9, 1, 64)
    for _ in range(2):
        assert_close(choice.cross_attention_cuda(*given), exactly(*given), "bfloat16")
    assert on_hopper == [PLAIN] * 3
    assert len(caplog.records) == 1 and "\n" not in caplog.messages[0]
    reason = {"raises": "ptxas: no", "differs": "its results differ from the plain kernel's by up to "}[fault]
    assert f"cpu has the plain cross-attention kernel; Hopper's own failed: {reason}" in caplog.messages[0]


def test_the_plain_kernel_runs_in_a_capture_where_asked_for_and_elsewhere(on_hopper, monkeypatch):
    given = tensors(2, 70, 20, 9, 1, 64)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        choice.cross_attention_cuda(*given)
    with monkeypatch.context() as patch:
        patch.setenv(choice.PLAIN, "1")
        choice.cross_attention_cuda(*given)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        choice.cross_attention_cuda(*given)
    assert on_hopper == [PLAIN] * 3
    choice.cross_attention_cuda(*given)
    assert on_hopper[-1] == HOPPER  # a capture decides nothing for later


def test_boxes_take_the_plain_kernel(on_hopper, monkeypatch, assert_close):
    q, text, concepts, mask, rms, bias = tensors(2, 70, 20, 9, 1, 64)
    boxes = torch.rand(1, 70, 3, generator=torch.Generator().manual_seed(2)) < 0.5
    given = []
    monkeypatch.setattr(choice, "cross_attention_triton", lambda out, *more: given.append(more) or out)
    choice.cross_attention_cuda(q, text, concepts, mask, rms, bias, boxes)
    assert on_hopper == [] and len(given) == 1 and given[0][-1] is boxes
