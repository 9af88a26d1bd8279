"""Near-duplicates: the same photograph again, recompressed, resized, mirrored or turned by quarter turns.

Dermoscopy images are alike, a dark blob on skin, often in the round black frame of the instrument, and so are
their usual perceptual hashes. What tells photographs apart is their detail. So the centred square that models
see, 32 x 32 pixels of luminance, first loses its coarse shapes, its light and its frame: what a Gaussian blur
leaves over is blurred and subtracted once more (twicing) and divided by the contrast of its neighbourhood.
Then

1. the phash of this detail in all eight views is compared with the hashes of the other images, exactly up to
   `MAX_DISTANCE` bits, by multi-index hashing; and
2. the pairs found are confirmed by the correlation of their details in the view that matched.

Measured on 6,539 images of HAM10000 and UDA-1: of their 21 million pairs, 7,433 are within 8 bits by phash
alone and 279 by phash of the detail; the most similar of these correlates at 0.55, copies at 0.82 and above.
Put behind one and the same round frame, they make 0 to 24 false pairs, depending on its radius and softness.

It finds copies recompressed (JPEG quality 20 to 75), resized (half the size, down to 128 pixels), mirrored,
turned by quarter turns, brightened or darkened by a fifth, grey, or cut to their centred square. It does not
reliably find crops (98 of 100 at 98 % of the side, 21 at 95 %, none at 90 %), turns by other angles, images
squeezed to another aspect, pictures that are exactly their own mirror image, nor another photograph of the
same lesion.

Sources: phash of the ImageHash library (8 x 8 low frequencies above their median); multi-index hashing of
Norouzi, Punjani and Fleet, arXiv 1307.2982; local contrast normalisation of Jarrett et al., ICCV 2009,
section 2; twicing of Tukey, Exploratory Data Analysis, 1977. That lesion ids do not suffice in HAM10000:
Abhishek et al., arXiv 2401.14497.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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
MIN_DETAIL = 3.5  # root mean square, in the units of the stored detail; below it an image shows nothing

_DETAIL_SCALE = 24  # the largest possible detail is near 5
_NOISE = 6.0  # grey levels of local contrast below which detail counts less
_BLACK_LEVEL, _SEEN_LEVEL = 12, 32  # grey levels between which a frame passes into the picture
_CAPPED = [min(level, _SEEN_LEVEL) for level in range(256)]
_NEIGHBOURS = np.exp(-((np.arange(SIDE)[:, None] - np.arange(SIDE)) ** 2) / (2 * 2.0**2))  # of 2 pixels
_NEIGHBOURS /= _NEIGHBOURS.sum(axis=1, keepdims=True)

_SIGNATURE = np.dtype([("hashes", "<u8", (NUM_VIEWS,)), ("detail", "i1", (SIDE, SIDE))])
SIGNATURE_BYTES = _SIGNATURE.itemsize

# If two hashes differ in at most 8 bits, they differ in at most 2 bits of one of three bands.
_BANDS = ((0, 22), (22, 21), (43, 21))  # first bit, number of bits
_BAND_DISTANCE = MAX_DISTANCE // len(_BANDS)
# Neighbouring frequencies are skewed alike: every third goes to the same band, so that all bands tell apart.
_SPREAD = np.argsort(np.arange(64) % len(_BANDS), kind="stable")
_CHUNK = 2**20  # comparisons held in memory at once


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that show the same photograph.

    Attributes:
        first: row of one image.
        second: row of the other, larger than `first`.
        view: the symmetry, numbered as in `isic_vq.data.augmentation`, that turns the first into the second.
        distance: bits in which their hashes differ in that view, 0 to `MAX_DISTANCE`.
        similarity: correlation of their details in that view, `MIN_SIMILARITY` to 1.
    """

    first: int
    second: int
    view: int
    distance: int
    similarity: float


def signature(image: Image.Image | bytes) -> bytes:
    """Describe an image in `SIGNATURE_BYTES` bytes, by which `find_duplicates` recognises it.

    The same image always gives the same bytes. An encoded large JPEG is read at a fraction of its size, which
    is faster and changes the signature about as little as recompression does.

    Args:
        image: of 16 pixels or more and any mode that the image processor takes, or its encoded bytes.

    Raises:
        ImageError: the image is damaged or smaller than 16 pixels.
    """
    square = IsicVQImageProcessor(size=SIDE).to_square(image)
    detail = np.rint(_DETAIL_SCALE * _detail(Image.fromarray(square).convert("L"))).clip(-127, 127)
    picture = (detail + 128).astype(np.uint8)
    hashes = [_hash(view(picture, number)) for number in range(NUM_VIEWS)]
    return np.array((hashes, detail), dtype=_SIGNATURE).tobytes()


def find_duplicates(signatures: Sequence[bytes]) -> list[DuplicatePair]:
    """Find the pairs of images that show the same photograph.

    An image without detail (of one colour, or a smooth ramp) is like any of its kind and never in a pair.

    Args:
        signatures: of `signature`, one per row; they are copied, 1.1 KB each.

    Returns:
        Pairs sorted by `first` and `second`, each once, in the view that matches best. Among many copies of
        one photograph every two are a pair.

    Raises:
        ValueError: a signature has another length.
    """
    for row, content in enumerate(signatures):
        if len(content) != SIGNATURE_BYTES:
            raise ValueError(
                f"The signature of row {row} has {len(content)} bytes, expected {SIGNATURE_BYTES}: "
                "make it again with isic_vq.data.duplicates.signature."
            )
    table = np.frombuffer(b"".join(signatures), dtype=_SIGNATURE)
    rows = np.flatnonzero([_strength(entry) >= MIN_DETAIL for entry in table["detail"]])
    hashes = table["hashes"][rows]
    first, second, number = near_hashes(hashes)
    similarity = _similarities(table["detail"], rows[first], rows[second], number)
    distance = np.bitwise_count(hashes[first, number] ^ hashes[second, 0])
    best: dict[tuple[int, int], DuplicatePair] = {}
    for at in np.argsort(-similarity, kind="stable"):
        if similarity[at] < MIN_SIMILARITY:
            break
        key = int(rows[first[at]]), int(rows[second[at]])
        best.setdefault(key, DuplicatePair(*key, int(number[at]), int(distance[at]), float(similarity[at])))
    return [best[key] for key in sorted(best)]


def near_hashes(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Find all pairs of rows whose hashes differ in at most `MAX_DISTANCE` bits in some view.

    Args:
        hashes (array of shape (rows, 8), uint64): of every row in all views.

    Returns:
        First row, second row and view of every match, int64 of shape (matches,), sorted: the hash of `first`
        in `view` is near the hash of `second` in view 0, and first < second.
    """
    queries = np.ascontiguousarray(hashes).ravel()
    found = [np.empty(0, np.int64)]
    for start, width in _BANDS:
        keys = ((queries >> np.uint64(start)) & np.uint64(2**width - 1)).astype(np.int64)
        found += list(_matches_in_band(queries, keys, width))
    matches = np.unique(np.concatenate(found))
    query, second = np.divmod(matches, max(len(hashes), 1))
    first, number = np.divmod(query, NUM_VIEWS)
    return first, second, number


def drop_from_train(
    pairs: Sequence[DuplicatePair], splits: Sequence[str], names: Sequence[str]
) -> dict[int, str]:
    """Choose the training rows to leave out because validation or test shows the same photograph.

    Duplicates within one split, or between validation and test, stay; `duplicate_report` lists them. Other
    photographs of the lesion that is left out stay as well.

    Args:
        pairs: of `find_duplicates`.
        splits: of every row: "train", "validation", "test" or "excluded".
        names: of every row, for the reasons.

    Returns:
        The reason by row, sorted by row; it names the most similar image.
    """
    reasons: dict[int, str] = {}
    for pair in sorted(pairs, key=lambda pair: -pair.similarity):
        for row, other in ((pair.first, pair.second), (pair.second, pair.first)):
            if splits[row] == "train" and splits[other] in ("validation", "test"):
                reasons.setdefault(row, f"same photograph as {names[other]} of {splits[other]}")
    return dict(sorted(reasons.items()))


def duplicate_report(pairs: Sequence[DuplicatePair], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tell what the pairs are, ready for JSON.

    Args:
        pairs: of `find_duplicates`.
        rows: all rows, with the columns of `FEATURES` and `split`.

    Returns:
        `num_images`; `num_pairs`; the pairs counted by `relations` ("same isic_id", "same lesion", "different
        lesions", or "unknown lesion" where one has no lesion id), by `sources`, by `splits` (both of a pair,
        in alphabetical order) and by `views`; and the `pairs` themselves with the names of their images.
    """
    listed = []
    for pair in pairs:
        first, second = rows[pair.first], rows[pair.second]
        listed.append(
            {
                **asdict(pair),
                "names": [first["isic_id"], second["isic_id"]],
                "relation": _relation(first, second),
                "sources": _both(first["source"], second["source"]),
                "splits": _both(first["split"], second["split"]),
            }
        )
    return {
        "num_images": len(rows),
        "num_pairs": len(listed),
        "relations": _counts(entry["relation"] for entry in listed),
        "sources": _counts(entry["sources"] for entry in listed),
        "splits": _counts(entry["splits"] for entry in listed),
        "views": _counts(str(entry["view"]) for entry in listed),
        "pairs": listed,
    }


def _detail(luminance: Image.Image) -> NDArray[np.float64]:
    """What is left of a picture without its coarse shapes, its light and the dark frame of a dermoscope.

    Args:
        luminance: of mode "L" and `SIDE` pixels a side.

    Returns:
        Detail in units of the local contrast, of shape (SIDE, SIDE), about -5 to 5; 0 in and beside a frame.
    """
    level = np.asarray(_frame_level(luminance).filter(ImageFilter.MinFilter(5)), dtype=np.float64)
    weight = ((level - _BLACK_LEVEL) / (_SEEN_LEVEL - _BLACK_LEVEL)).clip(0, 1)
    mass = _blur(weight) + 1e-6
    residual = np.asarray(luminance, dtype=np.float64)
    for _ in range(2):  # once leaves a step wherever light falls off towards an edge
        residual = residual - _blur(weight * residual) / mass
    contrast = np.sqrt(_blur(weight * residual**2) / mass)
    return weight * residual / (contrast + _NOISE)


def _frame_level(luminance: Image.Image) -> Image.Image:
    """The lightest level, at most `_SEEN_LEVEL`, on the darkest way to each pixel from outside the picture.

    It is low in a dark frame and in what hangs together with it, but not in a dark lesion.
    """
    walls = ImageOps.expand(luminance.point(_CAPPED), border=1, fill=0)
    level = ImageOps.expand(Image.new("L", luminance.size, _SEEN_LEVEL), border=1, fill=0)
    while (lower := ImageChops.lighter(walls, level.filter(ImageFilter.MinFilter(3)))) != level:
        level = lower
    return ImageOps.crop(level, border=1)


def _blur(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average over Gaussian neighbourhoods; what lies outside the picture does not count."""
    return _NEIGHBOURS @ values @ _NEIGHBOURS.T


def _hash(picture: NDArray[np.uint8]) -> int:
    """The 64 bits of a picture's phash, in the order in which the bands cut them."""
    bits = imagehash.phash(Image.fromarray(np.ascontiguousarray(picture))).hash.ravel()
    return int.from_bytes(np.packbits(bits[_SPREAD], bitorder="little"), "little")


def _strength(detail: NDArray[np.int8]) -> float:
    """The root mean square of a stored detail."""
    return float(np.linalg.norm(detail.astype(np.float32))) / SIDE


def _similarities(
    details: NDArray[np.int8], first: NDArray[np.int64], second: NDArray[np.int64], views: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The correlation of details, of which the first is turned into its view, for every pair."""
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
    """Yield the matches among the hashes that differ in at most `_BAND_DISTANCE` bits of a band.

    Args:
        queries: hash number 8 * row + view.
        keys: the band of every hash.
        width: its number of bits.

    Yields:
        Matches as query * number of rows + second row.
    """
    num_rows = len(queries) // NUM_VIEWS
    order = np.argsort(keys[::NUM_VIEWS], kind="stable")
    sorted_hashes = queries[::NUM_VIEWS][order]
    ends = np.bincount(keys[::NUM_VIEWS], minlength=2**width).cumsum()
    sizes = np.diff(ends, prepend=0)
    occupied = sizes > 0
    flips = [
        sum(1 << bit for bit in bits)
        for distance in range(_BAND_DISTANCE + 1)
        for bits in itertools.combinations(range(width), distance)
    ]
    for block in range(0, len(queries), _CHUNK):
        for flip in flips:
            flipped = keys[block : block + _CHUNK] ^ flip
            hits = np.flatnonzero(occupied[flipped])
            for query, place in _expand(hits, ends[flipped[hits]], sizes[flipped[hits]]):
                query += block
                near = np.bitwise_count(queries[query] ^ sorted_hashes[place]) <= MAX_DISTANCE
                query, second = query[near], order[place[near]]
                later = second > query // NUM_VIEWS
                yield query[later] * num_rows + second[later]


def _expand(
    queries: NDArray[np.int64], ends: NDArray[np.int64], sizes: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield every query with every place of its bucket, which ends before `ends`, some `_CHUNK` at a time."""
    total = sizes.cumsum()
    start = 0
    while start < len(queries):
        done = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, done + _CHUNK, side="right")))
        counts = sizes[start:stop]
        query = np.repeat(queries[start:stop], counts)
        place = np.arange(len(query)) + np.repeat(ends[start:stop] - (total[start:stop] - done), counts)
        yield query, place
        start = stop


def _relation(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    if first["isic_id"] and first["isic_id"] == second["isic_id"]:
        return "same isic_id"
    if not (first["lesion_id"] and second["lesion_id"]):
        return "unknown lesion"
    return "same lesion" if first["lesion_id"] == second["lesion_id"] else "different lesions"


def _both(first: str | None, second: str | None) -> str:
    return " / ".join(sorted(name or "unknown" for name in (first, second)))


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
