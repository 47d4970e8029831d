"""What `serve` and `generate` say of Ray: options, what cannot work, and the workers that are meant."""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING, Any

from ...errors import InputError, how_to_install, not_loaded

if TYPE_CHECKING:
    from .interface import Worker
    from .ray_worker import Gateway


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """Where workers are, and when one is taken for lost."""
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="workers are on the nodes of this Ray cluster; local: of one of its own",
    )
    group.add_argument(
        "--gpus-per-worker",
        type=int,
        default=1,
        metavar="N",
        help="GPUs of one machine that make a request together, with --backend torch (1)",
    )
    group.add_argument(
        "--step-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="a worker that says nothing of its job for so long, as it does at every step, is replaced (600)",
    )


def check(args: argparse.Namespace) -> None:
    """Raises InputError for options that cannot work, and where Ray is not installed."""
    if not 1 <= args.gpus_per_worker <= 64:
        raise InputError(f"--gpus-per-worker must be 1 to 64, not {args.gpus_per_worker}")
    if not 0 < args.step_timeout < 1e6:
        raise InputError(f"--step-timeout must be more than 0 seconds, not {args.step_timeout:g}")
    if args.ray is None:
        return
    if importlib.util.find_spec("ray") is None:
        raise not_loaded("ray", how_to_install("ray"), ModuleNotFoundError("none", name="ray"))
    if args.ray.startswith("ray://"):
        raise InputError(
            "--ray takes no ray://: run this on a node of the cluster, and give its head's address, HOST:6379"
        )
    host, _, port = args.ray.rpartition(":")
    if args.ray not in ("local", "auto") and not (host and port.isdecimal() and int(port) < 65536):
        raise InputError(f"--ray must be local, auto, or HOST:PORT of a cluster's head, not {args.ray!r}")


def workers(
    args: argparse.Namespace, bundle: str, options: dict[str, Any], gateway: Gateway, count: int
) -> list[Worker]:
    """So many, of a bundle. options: as of ProcessWorker, threads among them."""
    from .ray_worker import Needs, RayWorker

    needs = Needs(0, args.gpus_per_worker) if args.device != "cpu" else Needs(options["threads"], 0)
    return [RayWorker(bundle, options, gateway, needs) for _ in range(count)]
