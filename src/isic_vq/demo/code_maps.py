"""Pictures of codes: the code and the bits of each position, and the use of each code.

Similar codes have similar colours, so that a map of codes shows the lesion. In YCbCr, Y is the rank of a code's
brightness, and Cb and Cr are its ranks along the codebook's two main axes (singular vectors of its centred vectors).
"""

import math

import numpy as np
from numpy.typing import NDArray

from isic_vq.figures.grid import enlarge
from isic_vq.figures.numbers import CodebookUse

Pixels = NDArray[np.uint8]

MAP_SIZE = 384  # minimum side of an enlarged map, in pixels
# Minimum and maximum of Y, Cb and Cr: away from black, white and neon, and within RGB at every corner.
COLOR_RANGES = np.array([[55, 205], [-28, 28], [-35, 35]])
TO_RGB = np.array([[1, 0, 1.402], [1, -0.344, -0.714], [1, 1.772, 0]])  # ITU-R BT.601, as JPEG has it
# From 0 to `MOST_BITS`.
BITS_COLORS = ((247, 245, 240), (233, 196, 148), (196, 110, 84), (116, 40, 62), (36, 14, 32))
MOST_BITS = 1.5  # the darkest value, in multiples of log2 K, the bits of a code under a uniform distribution
NUM_LISTED = 10


def code_colors(codebook: NDArray[np.floating], brightness: NDArray[np.floating]) -> Pixels:
    """Colours RGB `(K, 3)` uint8 of codes, from their vectors `(K, D)` and the brightness `(K,)` of their patches."""
    centred = codebook.astype(np.float64) - codebook.mean(axis=0, dtype=np.float64)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * np.sign(
        axes[:2].sum(axis=1, keepdims=True)
    )  # the signs of singular vectors are arbitrary
    features = np.column_stack([brightness, centred @ axes.T])
    ranks = features.argsort(axis=0, kind="stable").argsort(axis=0) / max(len(codebook) - 1, 1)
    least, most = COLOR_RANGES[: features.shape[1]].T
    ycbcr = least + (most - least) * ranks
    return np.round(ycbcr @ TO_RGB[:, : features.shape[1]].T).astype(np.uint8)


def code_map(codes: NDArray[np.integer], colors: Pixels, size: int = MAP_SIZE) -> Pixels:
    """Show codes `(h, w)` as squares of their colours `(K, 3)`, at least `size` pixels wide: RGB, uint8."""
    return enlarge(colors[codes][None], size)[0]


def bits_map(bits: NDArray[np.floating], num_codes: int, size: int = MAP_SIZE) -> Pixels:
    """Show bits `(h, w)` as squares from pale (0) to dark (`MOST_BITS` log2 K or more), at least `size` pixels wide."""
    position = np.clip(bits / (MOST_BITS * math.log2(num_codes)), 0, 1) * (len(BITS_COLORS) - 1)
    ramp = np.asarray(BITS_COLORS, dtype=np.float64)
    channels = [np.interp(position, range(len(ramp)), ramp[:, channel]) for channel in range(3)]
    return enlarge(np.stack(channels, axis=-1).round().astype(np.uint8)[None], size)[0]


def overlay(pixels: Pixels, marked: NDArray[np.bool_]) -> Pixels:
    """Tint the pixels `(H, W, 3)` within a mask `(H, W)` blue."""
    blue = np.array([26, 102, 255])
    return np.where(marked[..., None], (pixels + blue) // 2, pixels).astype(np.uint8)


def use_table(use: CodebookUse, colors: Pixels) -> str:
    """Render the most used codes as a table in HTML: colour, number, patches, and a bar."""
    codes = use.most_used()
    rows = []
    for code, count in codes[:NUM_LISTED]:
        color = "#{:02x}{:02x}{:02x}".format(*colors[code])
        width = 100 * count / codes[0][1]
        rows.append(
            f'<tr><td><span class="swatch" style="background:{color}"></span>{code}</td><td>{count}</td>'
            f'<td class="wide"><span class="bar" style="width:{width:.0f}%"></span></td></tr>'
        )
    others = codes[NUM_LISTED:]
    rest = f"<p>{len(others)} other codes in {others[0][1]} patches or fewer each</p>" if others else ""
    return (
        f'<table class="facts"><caption>The most used codes, of {sum(use.counts)} patches</caption>'
        '<tr><th scope="col">Code</th><th scope="col">Patches</th><td></td></tr>'
        f"{''.join(rows)}</table>{rest}"
    )
