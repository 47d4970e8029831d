"""The command line: `generate` and `inspect`. See ``commands.py`` for exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..untrusted import printable
from . import generate_command
from .backends import torchrun
from .commands import Command, in_module, run_program

if TYPE_CHECKING:
    from .bundle_format.pictured import FrameConditioning
    from .bundle_format.schema import Manifest, TensorSpec


def main(argv: Sequence[str] | None = None, extra_commands: Sequence[Command] = ()) -> int:
    """Runs one command and returns its exit code, see ``commands.py``. Of several ranks that torchrun has
    started the first runs it, the others do what that tells them.

    Args: argv: the arguments, sys.argv's if None; extra_commands: commands that live outside the runtime.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if torchrun.rank() and arguments[:1] == ["generate"] and not {"--help", "-h"} & set(arguments):
        from .backends.pytorch import follower

        return follower.main()
    description = "Videos of several named, pictured things."
    return run_program("conceptmaster", description, [*COMMANDS, *extra_commands], argv)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "Verifies a bundle and says what is in it."
    parser.add_argument("bundle", metavar="BUNDLE", help="shipped bundle or a path")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def _inspect(args: argparse.Namespace) -> int:
    from .bundle_format import strict_json
    from .bundle_format.find import Bundle

    bundle = Bundle.open(args.bundle)
    manifest = bundle.manifest
    sizes = {
        name: sum((bundle.folder / entry.file).stat().st_size for entry in graph.files())
        for name, graph in manifest.graphs.items()
    }
    if args.json:
        report = strict_json.encode(manifest) | {"folder": str(bundle.folder), "bytes": sizes}
        print(json.dumps(report))
    else:
        print(_describe(manifest, sizes, bundle.folder))
    return 0


def _placements(conditioning: FrameConditioning) -> str:
    """Where the pictures of an image-to-video bundle stand."""
    placements, dropped = conditioning.placements, conditioning.dropped_frames
    if conditioning.beside:
        where = ", ".join(str(placement.first) for placement in placements)
        return f"{conditioning.required}, as latent frames {where} beside the video's"
    if conditioning.kind == "behind":
        least = f"{conditioning.required} to " if conditioning.required < len(placements) else ""
        return f"{least}{len(placements)}, as clean latent frames behind the video's"
    if conditioning.kind == "grids":
        least = f"{conditioning.required} to " if conditioning.required < len(placements) else ""
        return f"{least}{len(placements)}, each of its own size, up to {conditioning.side} pixels a side"
    where = ", ".join(f"frame {placement.first} (× {placement.count})" for placement in placements)
    if conditioning.kind == "canvas":
        cells = f"{conditioning.required} to {len(placements)}, in cells of one canvas, which is frame 0"
        return f"{cells}; {dropped} frames are left out"
    left_out = f"; {dropped} frames are left out for each" if dropped else ""
    alone = "" if conditioning.required else "; without one a video of text alone"
    return f"{conditioning.required} to {len(placements)}, as {where}{left_out}{alone}"


def _seen(manifest: Manifest) -> str:
    """What the picture encoder sees."""
    if manifest.pictures.tiled:
        return "tiled on one picture of"
    return "pictures" if manifest.shapes.concepts == manifest.concepts else "their canvas seen as"


def _experts(manifest: Manifest) -> str:
    """When each of two transformers runs, and its default guidance."""
    assert manifest.experts is not None
    high, low = (expert.name for expert in manifest.experts)
    at, (first, second) = manifest.experts[0].boundary, manifest.scales.values()
    return f"{high} from noise 1 to {at:g}, guidance {first:g}; {low} below, guidance {second:g}"


def _tiles(manifest: Manifest) -> str:
    """In which tiles a bundle decodes."""
    assert manifest.tile is not None
    space = manifest.shapes.space
    (height, width), shared = manifest.tile.size, manifest.tile.overlap
    return (
        f"in tiles of {space * width}×{space * height}, which share {space * shared[1]}×{space * shared[0]} "
        "pixels at least"
    )


def _prompt(manifest: Manifest) -> str:
    """What stands in prompts beside captions."""
    name, prefix = manifest.picture_name, manifest.prompt_prefix
    return f"prompt    behind {prefix!r}; the pictures are {name}0, {name}1, …, told behind their labels"


def _describe(manifest: Manifest, sizes: dict[str, int], folder: Path) -> str:
    s, d = manifest.shapes, manifest.defaults
    lines = [
        f"{manifest.name}: {manifest.precision} bundle, format {manifest.format}, every hash is right",
        f"folder    {folder}",
        f"video     {s.frames} frames of {s.width}×{s.height} at {manifest.fps:g} a second",
        f"concepts  up to {manifest.concepts}, {_seen(manifest)} {s.picture_size}×{s.picture_size}, "
        f"{s.queries} tokens{' each' if s.concepts == manifest.concepts else ''}"
        if "image_encoder" in manifest.graphs
        else f"concepts  up to {manifest.concepts}"
        if manifest.concepts
        else "concepts  none: a base alone",
        *(
            ["boxes     where concepts may be: --box LABEL x0,y0,x1,y1[@frame]"]
            if manifest.takes_boxes
            else []
        ),
        *([] if manifest.conditioning is None else [f"pictures  {_placements(manifest.conditioning)}"]),
        *([_prompt(manifest)] if manifest.picture_name else []),
        f"text      {manifest.prompt_tokens} tokens, labels {s.label_tokens}",
        f"latents   {' × '.join(map(str, s.latent))} (channels, frames, height, width)",
        *([] if manifest.tile is None else [f"decoding  {_tiles(manifest)}"]),
        f"guidance  {s.branches} branch{'es' if s.branches > 1 else ''}",
        *([] if manifest.experts is None else [f"experts   {_experts(manifest)}"]),
        "defaults  " + ", ".join(f"{key} {value!r}" for key, value in dataclasses.asdict(d).items()),
        *_made_for(manifest),
        *([] if manifest.source is None else [f"source    {manifest.source}"]),
        "written   " + ", ".join(f"{key} {value}" for key, value in manifest.written_by.items()),
        "",
        f"{'graph':14} {'size':>10}  inputs → outputs",
    ]
    for name, graph in manifest.graphs.items():
        inputs, outputs = _tensors(graph.inputs), _tensors(graph.outputs)
        lines.append(f"{name:14} {sizes[name] / 2**20:7.2f} MB  {inputs} → {outputs}")
    lines.append(f"{'all':14} {sum(sizes.values()) / 2**20:7.2f} MB")
    return "\n".join(printable(line, 10**5) for line in lines)


def _made_for(manifest: Manifest) -> list[str]:
    """The words and the ranges of a bundle that says them."""
    words, ranges = manifest.vocabulary, manifest.ranges
    lines = []
    if words is not None:
        kinds = {"labels": words.labels, **(words.phrases or {}), "words": words.words}
        lines += [f"{kind:9} {', '.join(entries)}" for kind, entries in kinds.items() if entries]
        lines += ["words     any other, too"] if words.open else []
    if ranges is not None:
        known = {kind: pair for kind, pair in dataclasses.asdict(ranges).items() if pair is not None}
        lines += ["made for  " + ", ".join(f"{kind} {a:g} to {b:g}" for kind, (a, b) in known.items())]
    return lines


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    """Names and shapes in one line; the decoder's many states as a count."""
    states = [spec for spec in specs if spec.name.startswith(("state_", "next_state_"))]
    named = [f"{spec.name} [{','.join(map(str, spec.shape))}]" for spec in specs if spec not in states]
    return ", ".join(named + ([f"{len(states)} states"] if states else []))


COMMANDS = (
    Command(
        "generate",
        "generate a video from a prompt and pictures",
        generate_command.add_arguments,
        generate_command.run,
    ),
    Command("inspect", "verify a bundle and say what is in it", _add_inspect, _inspect),
    in_module("serve", "take requests over HTTP, and show a page", f"{__package__}.server.command", "serve"),
)
