"""How far a result may be from its float64 reference: one table for tests and benchmarks."""

from __future__ import annotations

# dtype of the computation: (relative, absolute), for values of order one.
TOLERANCES = {
    "float64": (1e-10, 1e-10),
    "float32": (2e-5, 2e-5),
    "float16": (4e-3, 4e-3),
    "bfloat16": (3e-2, 3e-2),
}

# What computes in 8 bits is lossy by intent, and its single values say little: the relative L2 error of the
# whole result. Measured on normal inputs in Triton's interpreter, both sides in fp8, widths 96 to 8960:
# 3.6e-2 to 3.7e-2.
# Attention with queries, keys, values, probabilities and output in fp8, normal inputs, 80 to 32,760 tokens,
# by its reference: 4.4e-2 to 6.3e-2.
RELATIVE_L2 = {"linear8": 4e-2, "attention8": 7e-2}
