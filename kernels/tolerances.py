"""How far a result may be from its float64 reference: one table for tests and benchmarks."""

from __future__ import annotations

# dtype of the computation: (relative, absolute), for values of order one.
TOLERANCES = {
    "float64": (1e-10, 1e-10),
    "float32": (2e-5, 2e-5),
    "float16": (4e-3, 4e-3),
    "bfloat16": (3e-2, 3e-2),
}
