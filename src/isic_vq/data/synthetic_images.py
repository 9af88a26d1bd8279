"""Dermoscopy-like pictures drawn from a seed, for quick starts and tests.

A picture is skin with gentle shading, one lesion whose colours, border and symmetry follow its diagnosis, and sometimes
hairs. The diagnoses are caricatures of their textbook descriptions (a melanoma is dark, many-coloured, asymmetric and
ragged; a nevus is evenly brown and round), not measured on data: a model trained on these pictures learns nothing about
skin. A picture depends only on seed and index; it is bit-equal with one numpy on one machine, and may differ by rounding
on others.
"""

import hashlib
import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

from isic_vq.models.diagnosis import DIAGNOSES

SYNTHETIC_SIZE = 160  # pixels
SYNTHETIC_LICENSE = "CC0-1.0"
SYNTHETIC_ATTRIBUTION = "isic-vq synthetic images"

Array = NDArray[np.floating[Any]]

_SITES = ("back", "lower extremity", "trunk", "upper extremity", "abdomen", "face", "chest", "foot")
_SKIN_TONES = (
    (232, 196, 184),
    (224, 178, 160),
    (214, 160, 142),
    (226, 186, 158),
    (206, 152, 124),
    (218, 170, 166),
)


@dataclass(frozen=True)
class _Look:
    rim: tuple[int, int, int]  # colour at the border, RGB
    core: tuple[int, int, int]  # colour at the centre, RGB
    patch: tuple[int, int, int]  # colour of the irregular patches inside, RGB
    patch_share: float  # share of the lesion that the patches cover, 0 to 1
    raggedness: float  # amplitude of the border's waves, as a share of the radius
    asymmetry: float  # shift of the centre of colour, as a share of the radius
    softness: float  # width of the border, as a share of the radius
    opacity: float  # of the lesion over the skin, 0 to 1
    dots: tuple[int, tuple[int, int, int]] = (0, (0, 0, 0))  # number of small dots and their colour, RGB
    network: float = 0.0  # strength of the pigment network, 0 to 1


_LOOKS = {
    "melanoma": _Look(
        (122, 78, 58), (66, 42, 38), (92, 86, 92), 0.35, 0.24, 0.40, 0.12, 0.95, (8, (34, 24, 26)), 0.35
    ),
    "nevus": _Look((166, 112, 84), (118, 74, 54), (138, 88, 62), 0.30, 0.06, 0.05, 0.24, 0.85, network=0.4),
    "basal_cell_carcinoma": _Look(
        (214, 138, 128), (222, 156, 146), (128, 106, 118), 0.22, 0.14, 0.25, 0.25, 0.70, (5, (96, 78, 92))
    ),
    "actinic_keratosis": _Look(
        (206, 130, 116), (198, 112, 100), (226, 196, 172), 0.40, 0.20, 0.15, 0.45, 0.60, (14, (236, 214, 190))
    ),
    "benign_keratosis": _Look(
        (164, 114, 86), (138, 94, 70), (182, 138, 106), 0.40, 0.10, 0.10, 0.08, 0.88, (16, (222, 198, 162))
    ),
    "dermatofibroma": _Look(
        (184, 134, 108), (232, 204, 192), (222, 184, 168), 0.20, 0.05, 0.05, 0.35, 0.75, network=0.3
    ),
    "vascular_lesion": _Look(
        (188, 66, 68), (130, 34, 50), (96, 30, 56), 0.40, 0.09, 0.10, 0.07, 0.90, (10, (112, 24, 44))
    ),
    "squamous_cell_carcinoma": _Look(
        (204, 116, 106), (228, 198, 158), (164, 74, 66), 0.28, 0.18, 0.20, 0.20, 0.82, (9, (140, 48, 50))
    ),
}


def synthetic_image(index: int, seed: int, size: int = SYNTHETIC_SIZE) -> Image.Image:
    """Draw picture `index` of a seed: RGB, `size` pixels wide and high, of the diagnosis in `synthetic_metadata`."""
    rng = _generator(index, seed, stream=0)
    grid = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = grid[None, :], grid[:, None]
    pixels = _paint_skin(x, y, rng)
    _paint_lesion(pixels, x, y, _LOOKS[_diagnosis(index)], rng)
    if rng.random() < 0.4:
        _paint_hairs(pixels, rng)
    pixels += 2 * rng.standard_normal((size, size), dtype=np.float32)
    if rng.random() < 0.25:  # the dark rim of a dermoscope's tube
        pixels *= np.clip((1.36 - np.sqrt(x * x + y * y)) * 6, 0.05, 1)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def synthetic_metadata(index: int, seed: int) -> dict[str, Any]:
    """Return the record of picture `index` without its image; diagnoses alternate, and every picture is another lesion."""
    rng = _generator(index, seed, stream=1)
    return {
        "isic_id": f"SYNTHETIC_{seed}_{index:07d}",
        "lesion_id": f"SYNTHETIC_LESION_{seed}_{index:07d}",
        "patient_id": None,
        "diagnosis": _diagnosis(index),
        "age": float(5 * rng.integers(4, 18)),
        "sex": ("female", "male")[rng.integers(2)],
        "site": _SITES[rng.integers(len(_SITES))],
        "source": "synthetic",
        "license": SYNTHETIC_LICENSE,
        "attribution": SYNTHETIC_ATTRIBUTION,
    }


def synthetic_record(index: int, seed: int) -> dict[str, Any]:
    """Return the record of picture `index` with its image as PNG."""
    buffer = io.BytesIO()
    synthetic_image(index, seed).save(buffer, format="PNG", compress_level=1)
    metadata = synthetic_metadata(index, seed)
    return {"image": {"bytes": buffer.getvalue(), "path": f"{metadata['isic_id']}.png"}, **metadata}


def synthetic_fingerprint(num_images: int, seed: int) -> str:
    """The sha256 over count, seed and the first pictures' pixels, which changes with the generator."""
    digest = hashlib.sha256(f"synthetic:{num_images}:{seed}".encode())
    for index in range(min(num_images, 2 * len(_LOOKS))):
        digest.update(synthetic_image(index, seed).tobytes())
    return digest.hexdigest()


def _diagnosis(index: int) -> str:
    return DIAGNOSES[index % len(_LOOKS)]


def _generator(index: int, seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, index)))


def _mix(shares: list[Array], colours: ArrayLike) -> Array:
    """The sum of RGB colours weighted by a (size, size) map each: (3, size, size)."""
    return np.tensordot(np.asarray(colours, dtype=np.float32).T, np.stack(shares), axes=1)


def _clouds(size: int, cells: int, rng: np.random.Generator) -> Array:
    """Smooth noise (size, size) of about unit variance, from `cells` random values per side."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _paint_skin(x: Array, y: Array, rng: np.random.Generator) -> Array:
    size = x.shape[1]
    first, second = rng.choice(len(_SKIN_TONES), 2, replace=False)
    mix = rng.random()
    tone = tuple(np.average([_SKIN_TONES[first], _SKIN_TONES[second]], axis=0, weights=[1 - mix, mix]))
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 + 0.05 * (x * math.cos(angle) + y * math.sin(angle)) - 0.07 * (x * x + y * y)
    light += 0.025 * _clouds(size, 6, rng) + 0.015 * _clouds(size, size // 4, rng)
    return _mix([light, _clouds(size, 8, rng)], [tone, (0.8, -4.0, -3.2)])


def _paint_lesion(pixels: Array, x: Array, y: Array, look: _Look, rng: np.random.Generator) -> None:
    size = x.shape[1]
    centre_x, centre_y = rng.uniform(-0.18, 0.18, 2).tolist()
    turn, stretch = rng.uniform(0, math.pi), rng.uniform(1, 1.15 + look.asymmetry)
    u = ((x - centre_x) * math.cos(turn) + (y - centre_y) * math.sin(turn)) / stretch
    v = (y - centre_y) * math.cos(turn) - (x - centre_x) * math.sin(turn)
    distance, angle = np.sqrt(u * u + v * v), np.arctan2(v, u)
    border = _waves(angle, rng) + 0.5 * _clouds(size, 12, rng)
    border = rng.uniform(0.38, 0.62) * (1 + look.raggedness * border)
    cover = np.clip((border - distance) / (look.softness * border) + 0.5, 0, 1)
    cover *= look.opacity * cover * (3 - 2 * cover)

    off_centre = u - look.asymmetry * rng.uniform(0.5, 1.0) * border
    core = np.clip(1.2 - np.sqrt(off_centre**2 + v * v) / border + 0.15 * _clouds(size, 7, rng), 0, 1)
    patch = np.clip((_clouds(size, 7, rng) - 1.6 + 2.6 * look.patch_share) * 1.1 + 0.5, 0, 1)
    dots = _draw_dots(size, look, (centre_x, centre_y), float(border.mean()), rng)
    mesh = 1 + 0.35 * look.network * (np.minimum(np.abs(_clouds(size, size // 6, rng)), 1) - 0.6)
    ground = cover * mesh * (1 - dots)
    shares = [ground * (1 - patch) * (1 - core), ground * (1 - patch) * core, ground * patch, cover * dots]
    tint = 1 + rng.normal(0, 0.06) + rng.normal(0, 0.025, 3)
    pixels *= 1 - cover
    pixels += _mix(shares, tint * np.array((look.rim, look.core, look.patch, look.dots[1])))


def _waves(angle: Array, rng: np.random.Generator) -> Array:
    """A smooth random function of the angle, by a table."""
    turns = np.linspace(-math.pi, math.pi, 721, dtype=np.float32)
    table = sum(rng.normal() / k * np.cos(k * turns + rng.uniform(0, 2 * math.pi)) for k in range(2, 7))
    return np.asarray(table, dtype=np.float32)[((angle + math.pi) * (360 / math.pi)).astype(np.int16)]


def _draw_dots(
    size: int, look: _Look, centre: tuple[float, float], radius: float, rng: np.random.Generator
) -> Array:
    """The cover of the lesion's dots, (size, size) in [0, 1]."""
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.poisson(look.dots[0])):
        angle, reach = rng.uniform(0, 2 * math.pi), radius * math.sqrt(rng.uniform(0, 0.8))
        x = (centre[0] + reach * math.cos(angle) + 1) * size / 2
        y = (centre[1] + reach * math.sin(angle) + 1) * size / 2
        r = size * rng.uniform(0.006, 0.022)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=int(rng.uniform(120, 230)))
    return np.asarray(canvas.filter(ImageFilter.GaussianBlur(size / 160)), dtype=np.float32) / 255


def _paint_hairs(pixels: Array, rng: np.random.Generator) -> None:
    size = pixels.shape[1]
    canvas = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(canvas)
    steps = np.linspace(0, 1, 12)[:, None]
    for _ in range(rng.integers(2, 9)):
        start, bend, end = rng.uniform(-0.3, 1.3, (3, 2)) * 2 * size
        bend = (start + end) / 2 + 0.25 * (bend - (start + end) / 2)
        curve = (1 - steps) ** 2 * start + 2 * steps * (1 - steps) * bend + steps**2 * end
        draw.line(
            [tuple(point) for point in curve], fill=int(rng.uniform(130, 220)), width=int(rng.integers(1, 4))
        )
    cover = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255
    pixels *= 1 - cover
    pixels += _mix([cover], [(58, 42, 38)])
