"""Near-duplicates: the same photograph recompressed, resized, mirrored or turned by quarter turns.

Dermoscopy images are alike, a dark blob on skin, often in the round black frame of the instrument, and so are their usual
perceptual hashes; only detail tells photographs apart. Detail is what is left of the centred square of 32 x 32 pixels of
luminance without coarse shapes, illumination and frame: the residual of a Gaussian blur, blurred and subtracted once more
(twicing), divided by the local contrast. Then

1. the phash of the detail in all eight views is compared with the hashes of the other images, exactly up to
   `MAX_DISTANCE` bits, by multi-index hashing; and
2. these pairs are confirmed by the correlation of their details in the view that matched.

Measured on 6,539 images of HAM10000 and UDA-1: of their 21 million pairs, 7,433 are within 8 bits by phash of the image
and 279 by phash of the detail; the most similar of these correlates at 0.55, copies at 0.82 and above. Behind one common
round frame, they give 0 to 24 false pairs, depending on its radius and softness.

Found are copies that are recompressed (JPEG quality 20 to 75), resized (half the size, down to 128 pixels), mirrored,
turned by quarter turns, brightened or darkened by a fifth, grey, or cropped to their centred square. Not reliably found
are other crops (98 of 100 at 98 % of the side, 21 at 95 %, none at 90 %), other rotations, other aspect ratios, images
that equal their own mirror image, and other photographs of the same lesion.

Sources: phash of the ImageHash library (8 x 8 low frequencies above their median); multi-index hashing of Norouzi,
Punjani and Fleet, arXiv 1307.2982; local contrast normalisation of Jarrett et al., ICCV 2009, section 2; twicing of
Tukey, Exploratory Data Analysis, 1977; duplicates in HAM10000 under different lesion ids: Abhishek et al.,
arXiv 2401.14497.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import imagehash
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter, ImageOps

from isic_vq.data.augmentation import NUM_VIEWS, dihedral, view
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor

SIDE = 32  # pixels; four times the frequencies of the hash
MAX_DISTANCE = 8  # bits of 64
MIN_SIMILARITY = 0.8
MIN_DETAIL = 3.5  # root mean square of the stored detail; an image with less shows nothing

_DETAIL_SCALE = 24  # the largest possible detail is near 5
_NOISE = 6.0  # grey levels of local contrast below which detail counts less
_BLACK_LEVEL, _SEEN_LEVEL = 12, 32  # grey levels where the frame ends and where the picture begins
_CAPPED = [min(level, _SEEN_LEVEL) for level in range(256)]
_NEIGHBOURS = np.exp(-((np.arange(SIDE)[:, None] - np.arange(SIDE)) ** 2) / (2 * 2.0**2))  # of 2 pixels
_NEIGHBOURS /= _NEIGHBOURS.sum(axis=1, keepdims=True)

_SIGNATURE = np.dtype([("hashes", "<u8", (NUM_VIEWS,)), ("detail", "i1", (SIDE, SIDE))])
SIGNATURE_BYTES = _SIGNATURE.itemsize

# If two hashes differ in at most 8 bits, they differ in at most 2 bits of one of three bands.
_BANDS = ((0, 22), (22, 21), (43, 21))  # first bit, number of bits
_BAND_DISTANCE = MAX_DISTANCE // len(_BANDS)
# Neighbouring frequencies are correlated: every third bit goes to the same band, so that all bands discriminate.
_SPREAD = np.argsort(np.arange(64) % len(_BANDS), kind="stable")
_CHUNK = 2**18  # hashes that are looked up at once


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that show the same photograph."""

    first: int  # row of one image
    second: int  # row of the other, larger than `first`
    view: int  # number of the symmetry (`isic_vq.data.augmentation`) that turns the first into the second
    distance: int  # Hamming distance of their hashes in that view, 0 to `MAX_DISTANCE`
    similarity: float  # correlation of their details in that view, `MIN_SIMILARITY` to 1


def signature(image: Image.Image | bytes) -> bytes:
    """Describe an image of at least 16 pixels, or its encoded bytes, in `SIGNATURE_BYTES` bytes for `find_duplicates`.

    Encoded large JPEGs are decoded at a fraction of their size, which changes the signature as little as recompression.
    """
    square = IsicVQImageProcessor(size=SIDE).to_square(image)
    detail = np.rint(_DETAIL_SCALE * _detail(Image.fromarray(square).convert("L"))).clip(-127, 127)
    picture = (detail + 128).astype(np.uint8)
    hashes = [_hash(view(picture, number)) for number in range(NUM_VIEWS)]
    return np.array((hashes, detail), dtype=_SIGNATURE).tobytes()


def find_duplicates(signatures: Sequence[bytes]) -> list[DuplicatePair]:
    """Find the pairs of images that show the same photograph, sorted by `first` and `second`, from a `signature` per row.

    A pair is in the view that matches best; every two of several copies are a pair. Images without detail (of one colour, or
    a smooth gradient) are never in a pair.
    """
    for row, content in enumerate(signatures):
        if len(content) != SIGNATURE_BYTES:
            raise ValueError(
                f"signature {row} has {len(content)} bytes, expected {SIGNATURE_BYTES}: compute it again"
            )
    table = np.frombuffer(b"".join(signatures), dtype=_SIGNATURE)
    rows = np.flatnonzero([_strength(entry) >= MIN_DETAIL for entry in table["detail"]])
    hashes = table["hashes"][rows]
    first, second, number = near_hashes(hashes)
    similarity = _similarities(table["detail"], rows[first], rows[second], number)
    distance = np.bitwise_count(hashes[first, number] ^ hashes[second, 0])
    best: dict[tuple[int, int], DuplicatePair] = {}
    for match in np.argsort(-similarity, kind="stable"):
        if similarity[match] < MIN_SIMILARITY:
            break
        key = int(rows[first[match]]), int(rows[second[match]])
        pair = DuplicatePair(*key, int(number[match]), int(distance[match]), float(similarity[match]))
        best.setdefault(key, pair)
    return [best[key] for key in sorted(best)]


def near_hashes(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Find all pairs of rows whose hashes, `(rows, 8)` uint64, differ in at most `MAX_DISTANCE` bits in some view.

    Returns first row, second row and view of every match, int64, sorted: the hash of the first in that view is near the hash
    of the second in view 0, and first < second.
    """
    queries = np.ascontiguousarray(hashes).ravel()
    in_bands = [np.empty(0, np.int64)]
    for start, width in _BANDS:
        keys = ((queries >> np.uint64(start)) & np.uint64(2**width - 1)).astype(np.int64)
        in_bands += list(_matches_in_band(queries, keys, width))
    matches = np.unique(np.concatenate(in_bands))
    query, second = np.divmod(matches, max(len(hashes), 1))
    first, number = np.divmod(query, NUM_VIEWS)
    return first, second, number


def drop_from_train(
    pairs: Sequence[DuplicatePair], splits: Sequence[str], names: Sequence[str], num_fixed: int = 0
) -> dict[int, str]:
    """Choose rows to exclude, each with a reason, so that no photograph of training is in validation or test.

    That is the training row of a pair, or the other one if the training row is among the first `num_fixed`. Duplicates
    within a split, between validation and test, and other photographs of the lesion stay.
    """
    reasons: dict[int, str] = {}
    for pair in sorted(pairs, key=lambda pair: -pair.similarity):
        for train, other in ((pair.first, pair.second), (pair.second, pair.first)):
            if splits[train] != "train" or splits[other] not in ("validation", "test"):
                continue
            if train >= num_fixed:
                reasons.setdefault(train, f"same photograph as {names[other]} of {splits[other]}")
            elif other >= num_fixed:
                reasons.setdefault(other, f"same photograph as {names[train]} of train, which stays")
    return dict(sorted(reasons.items()))


def duplicate_report(pairs: Sequence[DuplicatePair], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count pairs of `find_duplicates` among `rows`, which have the columns of `FEATURES` and `split`, for JSON.

    Returns:
        `num_images`; `num_pairs`; pairs counted by `relations` ("same isic_id", "same lesion", "different lesions", or
        "unknown lesion" without both lesion ids), by `sources` and `splits` (of both images, in alphabetical order) and
        by `views`.
    """
    both = [(rows[pair.first], rows[pair.second]) for pair in pairs]
    return {
        "num_images": len(rows),
        "num_pairs": len(pairs),
        "relations": _counts(_relation(*images) for images in both),
        "sources": _counts(_joined(images, "source") for images in both),
        "splits": _counts(_joined(images, "split") for images in both),
        "views": _counts(str(pair.view) for pair in pairs),
    }


def _detail(luminance: Image.Image) -> NDArray[np.float64]:
    """The detail (see the module) of a picture of mode "L" and `SIDE` pixels a side, in units of the local contrast.

    It is about -5 to 5, and 0 in and beside the dark frame of a dermoscope.
    """
    level = np.asarray(_frame_level(luminance).filter(ImageFilter.MinFilter(5)), dtype=np.float64)
    weight = ((level - _BLACK_LEVEL) / (_SEEN_LEVEL - _BLACK_LEVEL)).clip(0, 1)
    mass = _blur(weight) + 1e-6
    residual = np.asarray(luminance, dtype=np.float64)
    for _ in range(2):  # one pass leaves a step where light falls off towards an edge
        residual = residual - _blur(weight * residual) / mass
    contrast = np.sqrt(_blur(weight * residual**2) / mass)
    return weight * residual / (contrast + _NOISE)


def _frame_level(luminance: Image.Image) -> Image.Image:
    """For each pixel, the lowest maximum (up to `_SEEN_LEVEL`) over all paths to it from outside the picture.

    It is low in a dark frame and in dark areas connected with it, but not in a dark lesion.
    """
    walls = ImageOps.expand(luminance.point(_CAPPED), border=1, fill=0)
    level = ImageOps.expand(Image.new("L", luminance.size, _SEEN_LEVEL), border=1, fill=0)
    while (lower := ImageChops.lighter(walls, level.filter(ImageFilter.MinFilter(3)))) != level:
        level = lower
    return ImageOps.crop(level, border=1)


def _blur(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return _NEIGHBOURS @ values @ _NEIGHBOURS.T


def _hash(picture: NDArray[np.uint8]) -> int:
    """The 64 bits of a picture's phash, ordered by band."""
    bits = imagehash.phash(Image.fromarray(np.ascontiguousarray(picture))).hash.ravel()
    return int.from_bytes(np.packbits(bits[_SPREAD], bitorder="little"), "little")


def _strength(detail: NDArray[np.int8]) -> float:
    return float(np.linalg.norm(detail.astype(np.float32))) / SIDE


def _similarities(
    details: NDArray[np.int8], first: NDArray[np.int64], second: NDArray[np.int64], views: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The correlation of the first detail in the given view with the second, for every pair."""
    similarities = np.empty(len(first), np.float32)
    for start in range(0, len(first), 4096):
        chunk = slice(start, start + 4096)
        turned = dihedral(torch.from_numpy(details[first[chunk]]), torch.from_numpy(views[chunk]))
        a, b = turned.numpy().astype(np.float32), details[second[chunk]].astype(np.float32)
        products = [np.einsum("nij,nij->n", *both) for both in ((a, b), (a, a), (b, b))]
        similarities[chunk] = products[0] / np.sqrt(products[1] * products[2])
    return similarities


def _matches_in_band(
    queries: NDArray[np.uint64], keys: NDArray[np.int64], width: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the matches whose hashes differ in at most `_BAND_DISTANCE` bits of a band.

    `queries` is hash 8 * row + view, `keys` its band of `width` bits. A match is query * number of rows + second row.
    """
    num_rows = len(queries) // NUM_VIEWS
    order = np.argsort(keys[::NUM_VIEWS], kind="stable")
    sorted_hashes = queries[::NUM_VIEWS][order]
    sizes = np.bincount(keys[::NUM_VIEWS], minlength=2**width)
    ends = sizes.cumsum()  # of the bucket of each key among the sorted hashes
    flips = [
        sum(1 << bit for bit in bits)
        for distance in range(_BAND_DISTANCE + 1)
        for bits in itertools.combinations(range(width), distance)
    ]
    for start in range(0, len(queries), _CHUNK):
        for flip in flips:
            buckets = keys[start : start + _CHUNK] ^ flip
            hits = np.flatnonzero(sizes[buckets])
            counts = sizes[buckets[hits]]
            query = np.repeat(start + hits, counts)
            place = np.arange(len(query)) + np.repeat(ends[buckets[hits]] - counts.cumsum(), counts)
            near = np.bitwise_count(queries[query] ^ sorted_hashes[place]) <= MAX_DISTANCE
            query, second = query[near], order[place[near]]
            later = second > query // NUM_VIEWS
            yield query[later] * num_rows + second[later]


def _relation(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    if first["isic_id"] and first["isic_id"] == second["isic_id"]:
        return "same isic_id"
    if not (first["lesion_id"] and second["lesion_id"]):
        return "unknown lesion"
    return "same lesion" if first["lesion_id"] == second["lesion_id"] else "different lesions"


def _joined(images: Sequence[Mapping[str, Any]], column: str) -> str:
    return " / ".join(sorted(image[column] or "unknown" for image in images))


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
