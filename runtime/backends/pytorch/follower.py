"""Any rank but 0: computes its part of what rank 0 tells it, and nothing else.

It prints nothing: what it fails of, rank 0 says. Started by rank 0 with a pipe, whose end is this process's;
or by torchrun, with the arguments of the command, which it does not read.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from typing import Any

import torch
from torch.distributed import Store

from ....errors import ConceptMasterError, InputError, is_out_of_memory
from ...bundle_format.find import Bundle
from ...bundle_format.graph_list import STEP_GRAPHS, condition_of
from ...logs import keep_quiet
from ...stop_signals import NAMES
from .. import torchrun
from .backend import TorchBackend
from .leader import fingerprint
from .options import TorchOptions
from .ranks import Gone, Ranks, device_kind, leave_word, meet
from .shared_step import follow
from .stepper import last_branch

GRACE = 5.0  # seconds in which rank 0 says what was wrong, before this process ends


def main(piped: bool = False) -> int:
    """Until rank 0 needs it no more; returns the exit code. piped: whether standard input tells that it is
    gone."""
    for name in NAMES:  # it has nothing to clean up
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    if piped:
        threading.Thread(target=_end_with_it, daemon=True).start()
    logging.disable()
    warnings.simplefilter("ignore")
    keep_quiet()
    store, rank, world = meet()
    try:
        ranks = Ranks(store, rank, world, _device(store))
        _follow(ranks)
        ranks.leave()
    except Gone:
        return 1
    except Exception as error:
        if not isinstance(error, ConceptMasterError) and not is_out_of_memory(error):
            traceback.print_exc()
        leave_word(store, rank, " ".join(str(error).split()) or type(error).__name__)
        time.sleep(GRACE)
        return 1
    return 0


def _end_with_it() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def _device(store: Store) -> torch.device:
    """This rank's, of the kind that rank 0 has."""
    kind, local = device_kind(store), torchrun.local_rank()
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"there is no GPU {local} for it, but {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local)
    return torch.device(kind)


def _follow(ranks: Ranks) -> None:
    asked, _ = ranks.hear()
    with ranks.together(hurry=False):
        backend = _open(asked, ranks)
        ranks.agree()
    with ranks.together():
        for branches in asked["cuts"]:
            ranks.cut(branches, asked["heads"])
    held = dict[int, dict[str, Any]]()
    while True:
        told, arrays = ranks.hear()
        for number in told["dropped"]:
            held.pop(number, None)
        if told["do"] == "close":
            return
        if told["do"] == "load":
            with ranks.together(hurry=False):
                backend.load(told["graphs"])
                ranks.agree()
        elif told["do"] == "condition":
            held[told["held"]] = _condition(backend, told["graph"], arrays)
        else:
            with ranks.together(), torch.inference_mode():
                known, branches = held[told["held"]], told["branches"]
                known = last_branch(known) if branches < asked["cuts"][0] else known
                follow(backend.steppers[told["graph"]].denoise, ranks, branches, known)


def _open(asked: dict[str, Any], ranks: Ranks) -> TorchBackend:
    """Raises InputError where this rank is not like rank 0."""
    bundle = Bundle.open(asked["bundle"]).with_custom(asked["custom"])
    own = fingerprint(bundle)
    for name, value in asked["print"].items():
        if own[name] != value:
            what = f"the bundle {asked['bundle']!r} with the manifest" if name == "manifest" else name
            raise InputError(f"it has {what} {own[name]:.12}, rank 0 has {value:.12}")
    options = TorchOptions.from_plain(asked["options"])
    return TorchBackend(bundle, asked["device"], asked["threads"], options, follows=ranks)


def _condition(backend: TorchBackend, graph: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the steps of a request take, but for what each step has of its own."""
    outputs = backend.run(graph, inputs)
    step = next(name for name in STEP_GRAPHS if condition_of(name) == graph)
    return backend.taken(step, inputs | outputs)


if __name__ == "__main__":
    sys.exit(main(piped=True))
