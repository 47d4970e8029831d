"""The graphs of a bundle: what each one follows, when it runs, and which models have it.

Exporter, signatures, pipeline and backends read this list; it stands in the order in which graphs run, and is
written down nowhere else.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

EACH_TEXT = "for each text"
ONCE = "once for a request"
EACH_STEP = "at each step"
FIRST_FRAME = "for the first latent frame"
LATER_FRAMES = "for each later latent frame"

BASE = "a base alone"
CONCEPTS = "a model with concept modules"
IMAGE_TO_VIDEO = "an image-to-video base"
FRAMES_ALONE = "an image-to-video base without a picture encoder"
TEXT_OR_IMAGE = "a base that takes a first picture, or none"
REFERENCES = "a base whose pictures are tokens of their own"


@dataclass(frozen=True)
class Graph:
    """runs: one of the five above; follows: the graph whose outputs it gets beside what the pipeline has, or,
    in a bundle without that one, what that one follows; models: those that have this graph; expert: of a
    model of two transformers the one that it is of, 1 or 2, and 0 for what is neither's.

    What runs for later frames also gets its own outputs back, from its second call on.
    """

    name: str
    runs: str
    follows: str | None = None
    models: tuple[str, ...] = (BASE, CONCEPTS, IMAGE_TO_VIDEO, FRAMES_ALONE, TEXT_OR_IMAGE, REFERENCES)
    expert: int = 0


GRAPHS = (
    Graph("text_encoder", EACH_TEXT),
    Graph("image_encoder", ONCE, models=(CONCEPTS, IMAGE_TO_VIDEO)),
    Graph("qformer", ONCE, "image_encoder", (CONCEPTS,)),
    Graph("dam", ONCE, "qformer", (CONCEPTS,)),
    Graph("condition", ONCE, "dam", expert=1),
    Graph("encode_first", FIRST_FRAME, models=(IMAGE_TO_VIDEO, FRAMES_ALONE, TEXT_OR_IMAGE, REFERENCES)),
    Graph("encode", LATER_FRAMES, "encode_first", (IMAGE_TO_VIDEO, FRAMES_ALONE)),
    Graph("denoise", EACH_STEP, "condition", expert=1),
    Graph("condition_2", ONCE, "dam", expert=2),
    Graph("denoise_2", EACH_STEP, "condition_2", expert=2),
    Graph("decode_first", FIRST_FRAME),
    Graph("decode", LATER_FRAMES, "decode_first"),
)
BY_NAME = {graph.name: graph for graph in GRAPHS}

CONCEPT_GRAPHS = tuple(graph.name for graph in GRAPHS if graph.runs == ONCE and BASE not in graph.models)
"""From pictures and labels to concept tokens: not needed for a request without concepts. Of an image-to-video
base, whose picture tokens are the concept tokens, there is the first alone."""

FRAME_GRAPHS = ("encode_first", "encode")
"""From pictures to latents of the video's frames: not needed, either."""

STEP_GRAPHS = tuple(graph.name for graph in GRAPHS if graph.runs == EACH_STEP)
"""The graph of a step: the first expert's, which a model of one transformer has alone, and the second's."""


def graphs_of(model: str, latent_frames: int, experts: int = 1) -> list[Graph]:
    """The graphs of a model (BASE, CONCEPTS, …) of one or two transformers, for a video of so many latent
    frames."""
    found = [graph for graph in GRAPHS if model in graph.models and graph.expert <= experts]
    return [graph for graph in found if latent_frames > 1 or graph.runs != LATER_FRAMES]


def other_expert(graph: str) -> set[str]:
    """The graphs of the other expert than that of `graph`; none of a graph that is neither's."""
    expert = BY_NAME[graph].expert
    return {other.name for other in GRAPHS if expert and other.expert == 3 - expert}


def condition_of(step_graph: str) -> str:
    """The graph that gives a step's graph what it needs of texts and concepts."""
    found = BY_NAME[step_graph].follows
    assert found is not None
    return found


def upstream(name: str, present: Container[str]) -> str | None:
    """The graph whose outputs the graph `name` gets, in a bundle of the graphs `present`; None for none."""
    before = BY_NAME[name].follows
    while before is not None and before not in present:
        before = BY_NAME[before].follows
    return before
