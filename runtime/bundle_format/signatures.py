"""What the pipeline gives to each graph and wants from it, held against a bundle's signatures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .graph_list import (
    BASE,
    CONCEPT_GRAPHS,
    CONCEPTS,
    FRAMES_ALONE,
    IMAGE_TO_VIDEO,
    LATER_FRAMES,
    REFERENCES,
    STEP_GRAPHS,
    TEXT_OR_IMAGE,
    condition_of,
    graphs_of,
    upstream,
)

if TYPE_CHECKING:
    from .schema import GraphFile, Shapes

Kind = tuple[str, tuple[int, ...]]  # dtype, shape


def check(
    graphs: dict[str, GraphFile],
    shapes: Shapes,
    conditioned: bool,
    decoded: tuple[int, int],
    collapsed: bool = False,
    kind: str = "frames",
    experts: int = 1,
    denoised: tuple[int, int, int, int] | None = None,
    side: int = 0,
    grid: tuple[int, int, int] | None = None,
    masks_tokens: bool = False,
) -> None:
    """Every input must be something that the pipeline has, in its dtype and shape; the outputs that the
    pipeline reads must be there; the frames must add up. A graph need not use all that it is offered.
    conditioned: whether the bundle's pictures are frames; decoded: height and width, in latents, of what
    the decoder takes at once; collapsed: whether one key stands for all padding of a text, which then must
    come with a bias; kind: of the pictures that are frames, one of pictured.py's KINDS, or `clean` where the
    one picture is the first latent frame itself; experts: how many transformers there are, 1 or 2; denoised:
    the latents that steps make, where some of them stand beside the video's (None: none do); side: of the
    square in which each picture is, in pixels, where these have a size of their own; grid: the video's
    patches, where a step is told which of them may see which concept; masks_tokens: whether a mask of
    concepts has an entry for each of their tokens.

    Raises: ValueError for the first difference.
    """
    pictured = bool(set(CONCEPT_GRAPHS) & set(graphs))
    kinds = (FRAMES_ALONE, IMAGE_TO_VIDEO) if conditioned else (BASE, CONCEPTS)
    own = {"clean": TEXT_OR_IMAGE, "behind": REFERENCES, "grids": REFERENCES}
    expected = graphs_of(own.get(kind, kinds[pictured]), shapes.latent[1], experts)
    names = [graph.name for graph in expected]
    if set(graphs) != set(names):
        raise ValueError(f"the graphs must be {', '.join(names)}; they are {', '.join(graphs):.300}")
    denoised = denoised or shapes.latent
    if side % shapes.space:
        raise ValueError(f"a side of {side} pixels is not one of whole latents of {shapes.space}")
    own_sides = (side // shapes.space,) * 2 if side else None
    entries = shapes.concepts * (shapes.queries if masks_tokens else 1)
    inputs = _inputs(shapes, decoded, kind, denoised, own_sides, entries)
    if grid is not None:
        for name in STEP_GRAPHS:
            inputs[name] = {**inputs[name], "boxes": ("bool", (math.prod(grid), shapes.concepts))}
    for graph in expected:
        sources = [upstream(graph.name, graphs)]
        if graph.runs == LATER_FRAMES:
            sources.append(graph.name)
        for source in sources:
            passed_on = {} if source is None else _passed_on(graphs[source])
            _check_inputs(graph.name, graphs[graph.name], inputs.get(graph.name, {}) | passed_on)
    for name, output, made in _outputs(shapes, upstream("condition", graphs), denoised, own_sides):
        if name not in graphs:
            continue
        found = graphs[name].output(output)
        if found is None or (found.dtype, found.shape) != made:
            raise ValueError(f"the graph {name} must give {output!r}, {_spelled(made)}")
    for name in STEP_GRAPHS[:experts]:
        if collapsed != (graphs[name].input("text_bias") is not None):
            raise ValueError(
                f"the graph {name} must take 'text_bias' where there is whole_text, and only there"
            )
        if grid is not None and graphs[name].input("boxes") is None:
            raise ValueError(f"the graph {name} must take 'boxes' where the manifest has them")
    _check_frames(graphs, shapes, decoded)


def _inputs(
    s: Shapes,
    decoded: tuple[int, int],
    kind: str,
    denoised: tuple[int, ...],
    own_sides: tuple[int, int] | None,
    entries: int,
) -> dict[str, dict[str, Kind]]:
    """own_sides: in latents, of pictures of a size of their own; entries: of a mask of concepts."""
    branches, latent = s.branches, s.latent
    mask: Kind = ("bool", (branches, entries))
    box: dict[str, Kind] = {"box": ("float32", (s.concepts, 4))}
    label: dict[str, Kind] = {
        "label_text": ("float32", (s.concepts, s.label_tokens, s.text_width)),
        "label_mask": ("bool", (s.concepts, s.label_tokens)),
    }
    decoder: dict[str, Kind] = {"latents": ("float32", (1, latent[0], 1, *decoded))}
    following = s.frames_per_latent
    kinds = {"clean": (1 + latent[0], 1), "behind": (latent[0], s.concepts)}
    kinds["grids"] = (1 + latent[0], s.concepts)
    known = kinds.get(kind, (following + latent[0], latent[1]))
    sides = own_sides or latent[2:]
    if denoised != latent:  # of what is kept, of what is made anew, and a mask of each pixel
        known = (2 * latent[0] + s.space**2, denoised[1])
    condition = {"text": ("float32", (branches, s.text_tokens, s.text_width)), "concept_mask": mask}
    step: dict[str, Kind] = {
        "state": ("float32", (s.solver_states, *denoised)),
        "time": ("float32", (1,)),
        "concept_mask": mask,
        "guidance": ("float32", (branches,)),
        "coefficients": ("float32", (s.solver_states, s.solver_states + 1)),
        "text_bias": ("float32", (branches, s.text_tokens)),
        "given": ("float32", (1, *known, *sides)),
    }
    return {
        "text_encoder": {
            "token_ids": ("int64", (1, s.text_tokens)),
            "token_mask": ("bool", (1, s.text_tokens)),
        },
        "image_encoder": {"pixels": ("float32", (s.concepts, 3, s.picture_size, s.picture_size)), **box},
        "qformer": {**box, **label},
        "dam": {**box, **label},
        **{name: step for name in STEP_GRAPHS},
        **{condition_of(name): condition for name in STEP_GRAPHS},
        "encode_first": _picture(s, own_sides),
        "encode": {"frames": ("float32", (following, s.height, s.width, 3))},
        "decode_first": decoder,
        "decode": decoder,
    }


def _picture(s: Shapes, own_sides: tuple[int, int] | None) -> dict[str, Kind]:
    """What the encoder of a first frame gets; of pictures of a size of their own, what is picture, too."""
    if own_sides is None:
        return {"frames": ("float32", (1, s.height, s.width, 3))}
    pixels = (side * s.space for side in own_sides)
    return {"frames": ("float32", (1, *pixels, 3)), "area": ("float32", (1, 1, 1, *own_sides))}


def _outputs(
    s: Shapes, makes_concepts: str | None, denoised: tuple[int, ...], own_sides: tuple[int, int] | None
) -> list[tuple[str, str, Kind]]:
    """(graph, output, kind); makes_concepts: the graph that gives the concept tokens, None for none."""
    latents: Kind = ("float32", (1, s.latent[0], 1, *(own_sides or s.latent[2:])))
    return [
        (makes_concepts or "", "concept_tokens", ("float32", (s.concepts, s.queries, s.concept_width))),
        ("encode_first", "latents", latents),
        ("encode", "latents", latents),
        ("text_encoder", "text", ("float32", (1, s.text_tokens, s.text_width))),
        *((name, "next_state", ("float32", (s.solver_states, *denoised))) for name in STEP_GRAPHS),
    ]


def _passed_on(graph: GraphFile) -> dict[str, Kind]:
    return {spec.name.removeprefix("next_"): (spec.dtype, spec.shape) for spec in graph.outputs}


def _check_inputs(name: str, graph: GraphFile, offered: dict[str, Kind]) -> None:
    for spec in graph.inputs:
        kind = (spec.dtype, spec.shape)
        if spec.name not in offered:
            raise ValueError(f"the graph {name} wants {spec.name!r:.80}, which nothing gives")
        if offered[spec.name] != kind:
            found = _spelled(offered[spec.name])
            raise ValueError(f"the graph {name} wants {spec.name!r:.80} as {_spelled(kind)}, it gets {found}")


def _check_frames(graphs: dict[str, GraphFile], s: Shapes, decoded: tuple[int, int]) -> None:
    total = 0
    height, width = (
        n * whole // m for n, whole, m in zip(decoded, (s.height, s.width), s.latent[2:], strict=True)
    )
    for name, calls in (("decode_first", 1), ("decode", s.latent[1] - 1)):
        if calls:
            frames = graphs[name].output("frames")
            if frames is None or frames.dtype != "float32" or frames.shape[1:] != (height, width, 3):
                raise ValueError(f"the graph {name} must give 'frames', float32 [f, {height}, {width}, 3]")
            total += calls * frames.shape[0]
    if total != s.frames:
        raise ValueError(f"the decoders give {total} frames, the video has {s.frames}")


def _spelled(kind: Kind) -> str:
    return f"{kind[0]} {list(kind[1])}"
