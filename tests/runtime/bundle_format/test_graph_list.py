"""The list of graphs against what bundles hold."""

from __future__ import annotations

import pytest

from conceptmaster.runtime.bundle_format import graph_list
from conceptmaster.runtime.bundle_format.find import Bundle
from conceptmaster.runtime.bundle_format.graph_list import (
    BASE,
    CONCEPTS,
    FRAMES_ALONE,
    IMAGE_TO_VIDEO,
    graphs_of,
    upstream,
)


def names(model: str, latent_frames: int = 5, experts: int = 1) -> list[str]:
    return [graph.name for graph in graphs_of(model, latent_frames, experts)]


def test_a_shipped_bundle_has_its_graphs_in_the_lists_order() -> None:
    assert list(Bundle.open("sprites").manifest.graphs) == names(CONCEPTS)


@pytest.mark.parametrize(
    ("model", "before"),
    [(BASE, None), (CONCEPTS, "dam"), (IMAGE_TO_VIDEO, "image_encoder"), (FRAMES_ALONE, None)],
)
def test_what_gives_concept_tokens_comes_before_the_conditions(model: str, before: str | None) -> None:
    present = names(model, experts=2)
    assert upstream("condition", present) == upstream("condition_2", present) == before
    assert upstream("denoise_2", present) == "condition_2"
    assert upstream("denoise", present) == "condition" and upstream("decode", present) == "decode_first"
    made = [name for name in graph_list.CONCEPT_GRAPHS if name in present]
    assert made[-1:] == ([] if before is None else [before])


def test_every_graph_runs_behind_what_it_follows() -> None:
    seen: set[str] = set()
    for graph in graph_list.GRAPHS:
        assert graph.follows is None or graph.follows in seen
        seen.add(graph.name)


def test_one_latent_frame_needs_no_second_graph() -> None:
    assert set(names(CONCEPTS)) - set(names(CONCEPTS, 1)) == {"decode"}


def test_a_second_expert_has_two_graphs_more() -> None:
    own = {"condition_2", "denoise_2"}
    assert set(names(BASE, experts=2)) - set(names(BASE)) == own
    assert graph_list.other_expert("denoise") == graph_list.other_expert("condition") == own
    assert graph_list.other_expert("denoise_2") == {"condition", "denoise"}
    assert graph_list.other_expert("decode") == set()
