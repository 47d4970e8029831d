"""What the pipeline gives to each graph and wants from it, held against a bundle's signatures."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .schema import GraphFile, Shapes

Kind = tuple[str, tuple[int, ...]]  # dtype, shape

CONCEPT_GRAPHS = ("image_encoder", "qformer", "dam")
"""From pictures and labels to concept tokens. A bundle of a base alone has none; of an image-to-video base,
whose picture tokens are the concept tokens, the first."""

ENCODERS = ("encode_first", "encode")
"""From frames to latents, of an image-to-video base."""

UPSTREAM = {  # a graph gets all outputs of the one before it, too
    "qformer": "image_encoder",
    "dam": "qformer",
    "condition": "dam",
    "denoise": "condition",
    "decode": "decode_first",
    "encode": "encode_first",
}


def check(graphs: dict[str, GraphFile], shapes: Shapes, given: bool, decoded: tuple[int, int]) -> None:
    """Every input must be something that the pipeline has, in its dtype and shape; the outputs that the
    pipeline reads must be there; the frames must add up. A graph need not use all that it is offered, and
    those of CONCEPT_GRAPHS may be absent together. given: whether the bundle's pictures are frames, too;
    decoded: height and width, in latents, of what the decoder takes at once.

    Raises: ValueError for the first difference.
    """
    inputs, upstream = _inputs(shapes, decoded), UPSTREAM
    absent: tuple[str, ...] = ENCODERS
    if given:
        absent, upstream = CONCEPT_GRAPHS[1:], UPSTREAM | {"condition": CONCEPT_GRAPHS[0]}
    elif not set(CONCEPT_GRAPHS) & set(graphs):
        absent += CONCEPT_GRAPHS
    inputs = {name: offered for name, offered in inputs.items() if name not in absent}
    if set(graphs) != set(inputs):
        raise ValueError(f"the graphs must be {', '.join(inputs)}; they are {', '.join(graphs)}")
    for name, offered in inputs.items():
        if upstream.get(name) in graphs:
            offered = offered | _given(graphs[upstream[name]])
        _check_inputs(name, graphs[name], offered)
    for name in ("encode", "decode"):  # from its second call on each gets its own state back
        if name in graphs:
            _check_inputs(name, graphs[name], inputs[name] | _given(graphs[name]))
    for name, (output, kind) in _outputs(shapes, given).items():
        if name not in inputs:
            continue
        found = graphs[name].output(output)
        if found is None or (found.dtype, found.shape) != kind:
            raise ValueError(f"the graph {name} must give {output!r}, {_spelled(kind)}")
    _check_frames(graphs, shapes, decoded)


def _inputs(s: Shapes, decoded: tuple[int, int]) -> dict[str, dict[str, Kind]]:
    branches, latent = s.branches, s.latent
    mask: Kind = ("bool", (branches, s.concepts))
    decoder: dict[str, Kind] = {"latents": ("float32", (1, latent[0], 1, *decoded))}
    following = frames_per_latent(s)
    known: Kind = ("float32", (1, following + latent[0], *latent[1:]))
    inputs: dict[str, dict[str, Kind]] = {
        "text_encoder": {
            "token_ids": ("int64", (1, s.text_tokens)),
            "token_mask": ("bool", (1, s.text_tokens)),
        },
        "image_encoder": {"pixels": ("float32", (s.concepts, 3, s.picture_size, s.picture_size))},
        "qformer": {},
        "dam": {
            "label_text": ("float32", (s.concepts, s.label_tokens, s.text_width)),
            "label_mask": ("bool", (s.concepts, s.label_tokens)),
        },
        "condition": {"text": ("float32", (branches, s.text_tokens, s.text_width)), "concept_mask": mask},
        "denoise": {
            "state": ("float32", (s.solver_states, *latent)),
            "time": ("float32", (1,)),
            "concept_mask": mask,
            "guidance": ("float32", (branches,)),
            "coefficients": ("float32", (s.solver_states, s.solver_states + 1)),
            "given": known,
        },
        "encode_first": {"frames": ("float32", (1, s.height, s.width, 3))},
        "encode": {"frames": ("float32", (following, s.height, s.width, 3))},
        "decode_first": decoder,
    }
    return inputs | {"decode": decoder} if latent[1] > 1 else inputs


def frames_per_latent(s: Shapes) -> int:
    """Video frames of every latent frame but the first, which is one."""
    return (s.frames - 1) // max(1, s.latent[1] - 1)


def _outputs(s: Shapes, given: bool) -> dict[str, tuple[str, Kind]]:
    tokens: tuple[str, Kind] = ("concept_tokens", ("float32", (s.concepts, s.queries, s.concept_width)))
    latents: tuple[str, Kind] = ("latents", ("float32", (1, s.latent[0], 1, *s.latent[2:])))
    return {
        CONCEPT_GRAPHS[0 if given else -1]: tokens,
        "encode_first": latents,
        "encode": latents,
        "text_encoder": ("text", ("float32", (1, s.text_tokens, s.text_width))),
        "denoise": ("next_state", ("float32", (s.solver_states, *s.latent))),
    }


def _given(graph: GraphFile) -> dict[str, Kind]:
    return {spec.name.removeprefix("next_"): (spec.dtype, spec.shape) for spec in graph.outputs}


def _check_inputs(name: str, graph: GraphFile, offered: dict[str, Kind]) -> None:
    for spec in graph.inputs:
        kind = (spec.dtype, spec.shape)
        if spec.name not in offered:
            raise ValueError(f"the graph {name} wants {spec.name!r}, which nothing gives")
        if offered[spec.name] != kind:
            given = _spelled(offered[spec.name])
            raise ValueError(f"the graph {name} wants {spec.name!r} as {_spelled(kind)}, it gets {given}")


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
