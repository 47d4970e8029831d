"""The command `conceptmaster serve`. Its help needs nothing but the standard library."""

from __future__ import annotations

import argparse
import importlib
import ipaddress
import logging
import tempfile
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from ...errors import InputError, how_to_install, not_loaded
from ..backends import check_choice
from ..bundle_format import DEFAULT
from ..generate_command import add_torch_options, worker_options
from ..workers import on_ray

log = logging.getLogger(__name__)

SERVE = """\
Takes requests over HTTP, as OpenAI's API of videos has them, and shows a page at the same address.

  conceptmaster serve --data jobs
  curl localhost:8000/v1/videos -F prompt="a ball in the middle falls down" \\
      -F input_reference=@ball.png -F label=ball

Each worker is a process with one loaded bundle. Jobs are kept in --data, and a server that was killed goes on
with them. docs/serving.md tells the rest.
"""
LOCAL = ("localhost", "127.0.0.1", "[::1]")
NEEDED = ("fastapi", "uvicorn", "multipart", "sse_starlette", "prometheus_client", "httpx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `serve`."""
    parser.description = SERVE
    where = parser.add_argument_group("where")
    where.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen at (127.0.0.1)")
    where.add_argument("--port", type=int, default=8000, metavar="P", help="(8000)")
    where.add_argument(
        "--public-url",
        metavar="U",
        help="the address that clients use, where it is another, as behind a proxy",
    )
    where.add_argument("--data", type=Path, metavar="DIR", help="where jobs are kept (a temporary folder)")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--bundle",
        action="append",
        metavar="NAME",
        help=f"shipped bundle or a path; repeatable ({DEFAULT})",
    )
    what.add_argument(
        "--custom", metavar="FILE", action="append", default=[],
        help="a delta of CustomDiffusion for every bundle: new words, such as <fox-1>, which every prompt "
        "then says; repeatable",
    )  # fmt: skip
    what.add_argument("--workers", type=int, default=1, metavar="N", help="processes for each bundle (1)")
    what.add_argument(
        "--max-workers",
        type=int,
        metavar="M",
        help="with --ray: as many as jobs wait, --workers to M for each bundle (--workers)",
    )
    what.add_argument("--device", metavar="NAME", default="cpu", help="cpu, cuda, tensorrt or rtx (cpu)")
    what.add_argument(
        "--backend", metavar="NAME", default="onnxruntime", help="onnxruntime or torch (onnxruntime)"
    )
    what.add_argument(
        "--gpu",
        action="append",
        metavar="ID",
        help="CUDA device of a worker, or several (0,1); repeatable: each in turn",
    )
    on_ray.add_arguments(what)
    what.add_argument("--precision", metavar="P", help="of the engines for --device tensorrt or rtx")
    what.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of each worker (its share of the CPUs)"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-queue", type=int, default=1000, metavar="N", help="jobs that may wait (1000)")
    limits.add_argument(
        "--max-queue-per-key", type=int, metavar="N", help="of one API key (as many as --max-queue)"
    )
    limits.add_argument("--max-body", type=int, default=96, metavar="MB", help="of a request (96)")
    limits.add_argument(
        "--keep", type=float, default=24.0, metavar="HOURS", help="how long a finished job's files stay (24)"
    )
    limits.add_argument(
        "--drain",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="to finish what is begun, at SIGTERM (60)",
    )
    limits.add_argument(
        "--idle",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="without a job, after which a worker beyond --workers is let go (60)",
    )
    who = parser.add_argument_group("who may ask")
    who.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, as hashes: NAME sha256:HEX")
    who.add_argument(
        "--new-key", metavar="NAME", help="make a key, add it to --api-key-file, print it, and end"
    )
    who.add_argument(
        "--no-auth",
        action="store_true",
        help="anybody who can reach --host may ask; said aloud, not by default",
    )
    who.add_argument(
        "--callback-host",
        action="append",
        default=[],
        metavar="H",
        help="that callback_url may name; repeatable",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="log every request, and what is odd about pictures, by label"
    )
    add_torch_options(parser.add_argument_group("with --backend torch"))


def run(args: argparse.Namespace) -> int:
    """Serves until it is told to stop; returns the exit code. Raises InputError before anything is loaded."""
    if args.new_key is not None:
        return _new_key(args)
    _check(args)
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise not_loaded(name, how_to_install("serve"), error) from error
    from . import server

    with ExitStack() as stack:
        if args.data is None:
            args.data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="conceptmaster-")))
            log.warning(
                "jobs are kept in a temporary folder and do not survive this server: --data keeps them"
            )
        return server.serve(args, worker_options(args), hosts(args))


def hosts(args: argparse.Namespace) -> tuple[str, ...] | None:
    """The names that requests may call the server by; None for any, where that is what was asked for."""
    public = () if args.public_url is None else ((urlsplit(args.public_url).hostname or "").lower(),)
    if _is_local(args.host):
        return (*LOCAL, args.host.lower(), *public)
    return None if not public else (*LOCAL, args.host.lower(), *public)


def _new_key(args: argparse.Namespace) -> int:
    from .keys import new_key

    if args.api_key_file is None:
        raise InputError("--new-key needs --api-key-file FILE, which it is added to")
    print(new_key(args.new_key, args.api_key_file))
    return 0


def _check(args: argparse.Namespace) -> None:
    check_choice(args.device, args.threads, args.backend, args.precision, args.gpus_per_worker)
    for gpu in args.gpu or ():
        if (count := len(gpu.split(","))) != args.gpus_per_worker:
            raise InputError(
                f"--gpu {gpu} names {count} GPU{'s' if count > 1 else ''} of a worker, --gpus-per-worker "
                f"{args.gpus_per_worker}"
            )
    ranges = {"port": (0, 65535), "workers": (1, 256), "max_queue": (1, 10**6), "max_body": (1, 4096)}
    ranges |= {"max_queue_per_key": (1, 10**6), "max_workers": (1, 4096)}
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{name.replace('_', '-')} must be {least} to {most}, not {value}")
    for name in ("keep", "drain", "idle"):
        if not 0 <= getattr(args, name) < 1e6:
            raise InputError(f"--{name} must be 0 or more, not {getattr(args, name):g}")
    if args.max_workers is not None:
        if args.ray is None:
            raise InputError("--max-workers goes with --ray: processes on this machine are --workers, always")
        if args.max_workers < args.workers:
            raise InputError(f"--max-workers {args.max_workers} is less than --workers {args.workers}")
    if args.ray is not None and args.gpu:
        raise InputError("--gpu is for workers on this machine: with --ray, Ray gives each worker its GPUs")
    on_ray.check(args)
    if not _is_local(args.host) and args.api_key_file is None and not args.no_auth:
        raise InputError(
            f"--host {args.host} lets others in: give --api-key-file FILE (--new-key makes keys), or say "
            "--no-auth"
        )
    if args.public_url is not None:
        try:
            parts = urlsplit(args.public_url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(
                f"--public-url must be an address like https://videos.example.org, not {args.public_url!r}"
            )


def _is_local(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
