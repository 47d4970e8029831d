"""ONNX Runtime, imported so that it keeps to itself: whoever needs it takes it from here.

From 1.30 on it sends the interpreter's path, the system, the CPU and the names of graphs to its maker, and
keeps a device's id and a database in the home folder. It decides so while it is imported and reads the
environment alone; its function `disable_telemetry_events` comes too late. So this file sets a variable, for
this process and those that it starts.
"""

from __future__ import annotations

import os

from ...errors import not_loaded

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

try:
    import onnxruntime
except (ImportError, MemoryError) as error:
    raise not_loaded("onnxruntime", "pip install onnxruntime", error) from error


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """What every session has. threads: how many compute, 1 or more.

    Threads that wait sleep: every session has its own, and by default they all spin while another session
    works, which made two threads slower than one.
    """
    options = onnxruntime.SessionOptions()
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


__all__ = ["onnxruntime", "session_options"]
