"""Refuse settings out of their range, and NaN and infinite numbers at the edge of the codes.

There such numbers would become codes or pixels that look sound. `forward` does not look for them: it stays traceable, and a
training loop checks its loss.
"""

import math
from typing import Any

import torch
from torch import Tensor

NUM_NAMED = 5  # images that an error names


def expect(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raise ValueError, "NAME is VALUE: expected EXPECTED", unless a condition holds."""
    if not holds:
        raise ValueError(f"{name} is {value!r}: expected {expected}")


def is_positive_int(value: Any) -> bool:
    """Whether a value is a whole number of at least 1, and not True."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_finite(tensor: Tensor, name: str, way_out: str) -> Tensor:
    """Return a tensor `(B, ...)` of floats if all are finite; a compiled or exported graph does not check.

    Raises:
        ValueError: NaN or infinite numbers; the message gives `name`, the images and `way_out`.
    """
    if torch.compiler.is_compiling():
        return tensor
    # A sum is finite unless a part is not, or it overflows; so most tensors are read once and nothing is allocated.
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    if math.isfinite(total.item()):
        return tensor
    bad = (~tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        images = ", ".join(map(str, bad[:NUM_NAMED])) + (", ..." if len(bad) > NUM_NAMED else "")
        raise ValueError(f"{name} of image {images} are not finite (NaN or infinite): {way_out}")
    return tensor


def damaged_or_overflow(dtype: torch.dtype) -> str:
    """Explain why a sound input became not finite inside a model, and the way out."""
    return f"the model's weights are damaged or overflow {str(dtype).removeprefix('torch.')}; load them again, in float32"
