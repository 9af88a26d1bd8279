"""Refuse settings out of their range, and NaN and infinite numbers at the edge of the codes.

There such numbers would become codes or pixels that look sound. `forward` does not look for them: it stays traceable, and a
training loop checks its loss.
"""

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

NUM_NAMED = 5  # images that an error names
# A float this far outside [0, 1] still rounds to 0 or 255: resampling noise, not a wrong range.
HALF_LEVEL = 0.5 / 255


def expect(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raise ValueError, "NAME is VALUE: expected EXPECTED", unless a condition holds."""
    if not holds:
        raise ValueError(f"{name} is {value!r}: expected {expected}")


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number, numpy's among them, of at least `least`, and not True."""
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= least


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


def check_pixels(pixel_values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return images `(B, 3, H, W)` in a precision if they lie in [0, 1], give or take `HALF_LEVEL`; as `check_finite`.

    Raises:
        ValueError: no floats, NaN or infinite numbers, or another range: its codes would look sound.
    """
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        kind = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise ValueError(
            f"pixel_values are {kind}: expected a tensor of floats in [0, 1], as the image processor makes it with "
            'return_tensors="pt"'
        )
    pixel_values = pixel_values.to(dtype)
    if torch.compiler.is_compiling() or not pixel_values.numel():
        return pixel_values
    low, high = (end.item() for end in pixel_values.aminmax())
    if low >= -HALF_LEVEL and high <= 1 + HALF_LEVEL:
        return pixel_values
    check_finite(pixel_values, "pixel_values", "expected RGB in [0, 1], as the image processor makes it")
    raise ValueError(
        f"pixel_values lie in [{low:.4g}, {high:.4g}]: expected RGB in [0, 1], as the image processor makes it; divide "
        "[0, 255] by 255, map [-1, 1] by (x + 1) / 2"
    )


def damaged_or_overflow(dtype: torch.dtype) -> str:
    """Explain why a sound input became not finite inside a model, and the way out."""
    return f"the model's weights are damaged or overflow {str(dtype).removeprefix('torch.')}; load them again, in float32"
