"""What all tests share: one table of tolerances, and one way to use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

# dtype of the computation: (relative, absolute), for values of order one.
TOLERANCES = {
    "float64": (1e-10, 1e-10),
    "float32": (2e-5, 2e-5),
    "float16": (4e-3, 4e-3),
    "bfloat16": (3e-2, 3e-2),
}


def _array(value: Any) -> np.ndarray:
    """A NumPy array of anything array-like; tensors of any dtype, device and gradient."""
    return value.detach().cpu().double().numpy() if hasattr(value, "detach") else np.asarray(value)


@pytest.fixture(scope="session")
def tolerances() -> dict[str, tuple[float, float]]:
    """The table: dtype name to (relative, absolute)."""
    return TOLERANCES


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """`assert_close(actual, expected, dtype="float32")`: same shape, and close by the table's row."""

    def check(actual: Any, expected: Any, dtype: Any = "float32") -> None:
        relative, absolute = TOLERANCES[str(dtype).removeprefix("torch.")]
        actual, expected = _array(actual), _array(expected)
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=relative, atol=absolute)

    return check
