"""Individual typology angle (ITA) of the skin around a lesion, from pixels alone.

Source: Chardon, Cretois and Hourseau, "Skin colour typology and suntanning pathways", 1991: atan2(L* - 50, b*) in degrees, in
CIELAB; the higher the lighter. It depends on a picture's light and white balance, which dermoscopy does not calibrate, and is no
Fitzpatrick type (arXiv 2207.02942): read the distribution of one set beside that of another, not single images.

Skin is approximated by the frame, an eighth of the side wide, without pixels of L* below 25 (hair, ink, the dark corners of a
dermoscope) or above 97 (reflections); lesions that reach the frame are in it. An image's angle is that of the median L* and the
median b* of these pixels.
"""

import math

import torch
from torch import Tensor

FRAME = 8  # the frame's width is one over this of the side
LIGHTNESS = (25.0, 97.0)  # of pixels that may be skin
MIN_SHARE = 0.1  # of the frame's pixels that may be skin, below which an image has no angle
# IEC 61966-2-1: linear sRGB to XYZ, and the white point D65.
TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
WHITE = (0.95047, 1.0, 1.08883)


def cielab(images: Tensor) -> Tensor:
    """L*, a* and b* `(B, 3, H, W)` of sRGB images `(B, 3, H, W)` in [0, 1], for D65 and the 2 degree observer."""
    values = images.double()
    linear = torch.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    xyz = torch.einsum("ij,bjhw->bihw", torch.tensor(TO_XYZ, dtype=torch.float64), linear)
    xyz = xyz / torch.tensor(WHITE, dtype=torch.float64)[:, None, None]
    x, y, z = torch.where(
        xyz > (6 / 29) ** 3, xyz.clamp(min=0) ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29
    ).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def typology_angles(images: Tensor) -> Tensor:
    """ITA in degrees, `(B,)` float64, of images `(B, 3, H, W)` in [0, 1]; not a number where the frame shows no skin."""
    height, width = images.shape[-2:]
    frame = torch.ones(height, width, dtype=torch.bool)
    frame[height // FRAME : height - height // FRAME, width // FRAME : width - width // FRAME] = False
    lightness, _, yellow = cielab(images)[:, :, frame].unbind(1)
    is_skin = (lightness >= LIGHTNESS[0]) & (lightness <= LIGHTNESS[1])
    angles = []
    for light, blue_to_yellow, kept in zip(lightness, yellow, is_skin, strict=True):
        if kept.double().mean() < MIN_SHARE:
            angles.append(math.nan)
        else:
            angles.append(
                math.degrees(
                    math.atan2(light[kept].median().item() - 50, blue_to_yellow[kept].median().item())
                )
            )
    return torch.tensor(angles, dtype=torch.float64)
