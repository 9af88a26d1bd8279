"""The .ivq file: a header, independent blocks of images, and a copy of the header.

    MAGIC | length, CRC-32 | header | block 0 | block 1 | ... | header | length, CRC-32 | END

The header is deflated JSON: the coding settings, and the number of images, coder, bytes and CRC-32 of every block. The
copy at the end is used if the first one is damaged. A block is the length of its names, the names as deflated JSON, and
the coded codes. Numbers are little-endian. A block that bytes inserted or missing before it have moved is found by its
distance from the end.

Checksums detect accidents, not attacks. So `check_names` looks at names, and the numbers in a header are bounded by its
size: entries by the bytes of their checksums, images by the bytes of their block.
"""

import json
import re
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from isic_vq.data.uri import IMAGE_SUFFIXES

MAGIC, END = b"\x89IVQ\r\n\x1a\n", b"\n\x1a\r\nQVI\x89"
FORMAT = 1
CODERS = ("static", "prior")
MAX_IMAGES = 256  # in a block
MAX_THREADS = 1024
MAX_RATIO = 32  # of a header when inflated; real ones inflate to a few times their bytes
MIN_ENTRY = 4  # bytes of a deflated header that the checksum of a block takes
MAX_NAME = 4096  # bytes of JSON that an image's name may inflate to
_FRAME, _LENGTH = struct.Struct("<II"), struct.Struct("<I")


class CodecError(ValueError):
    """A file that cannot be written or read; the message names the block, and what is lost."""


@dataclass(frozen=True)
class Layout:
    """All that the prior's probabilities depend on to the last bit."""

    prior: str  # hash of the weights
    lanes: int  # images computed at once
    threads: int
    dtype: str
    backend: str  # of the incremental computation
    torch: str
    precision: int  # probabilities are integers over two to this power
    canary: str  # hash of the integers of a known block, which identifies the machine's arithmetic


@dataclass(frozen=True)
class Settings:
    """The settings that a file was coded with."""

    tokenizer: str  # hash of the encoder and codebook
    num_codes: int
    grid_size: int
    label: int  # class id that all images were coded under
    table: str  # hash of the static table
    layout: Layout | None  # None if no block is coded under the prior


@dataclass(frozen=True)
class Block:
    """Some images."""

    names: list[str]
    coder: str  # "prior" or "static"
    payload: bytes
    codes_crc: int  # CRC-32 of the codes, which detects a machine that computes other probabilities


@dataclass(frozen=True)
class Entry:
    """A block as listed in the header, and the number of its first image; blocks follow one another in the file."""

    first: int
    num_images: int
    coder: str
    num_bytes: int
    crc: int
    codes_crc: int


def write_container(settings: Settings, blocks: Sequence[Block]) -> bytes:
    """Return the content of a file."""
    bodies = [_body(block) for block in blocks]
    index = [
        [len(block.names), CODERS.index(block.coder), len(body), zlib.crc32(body), block.codes_crc]
        for block, body in zip(blocks, bodies, strict=True)
    ]
    content = {"format": FORMAT, **asdict(settings), "blocks": index}
    header = _deflated(json.dumps(content, separators=(",", ":")))
    frame = _FRAME.pack(len(header), zlib.crc32(header))
    return b"".join([MAGIC, frame, header, *bodies, header, frame, END])


def read_container(content: bytes) -> tuple[Settings, list[Entry], list[Block | str]]:
    """Read settings and entries of a file's header, and for each entry the block or the reason why it cannot be read.

    Raises:
        CodecError: the content is no .ivq file, or several, or both copies of its header are damaged.
    """
    place = len(content) - len(END) - _FRAME.size
    first = _header(content, len(MAGIC), False) if content.startswith(MAGIC) else None
    last = _header(content, place, True) if content.endswith(END) else None
    # A block may hold the magic bytes by chance, but not with a header after them.
    starts = (match.start() for match in re.finditer(re.escape(MAGIC), content) if match.start())
    joined = next((start for start in starts if _header(content, start + len(MAGIC), False)), 0)
    if joined or (first and last and first != last):
        raise CodecError(
            f"{'at byte ' + str(joined) if joined else 'at its end'} is another .ivq file: cut them apart, and "
            "decompress each"
        )
    header = first or last
    if header is None:
        known = content.startswith(MAGIC) or content.endswith(END)
        raise CodecError(
            "the header and its copy at the end are both damaged" if known else "this is not an .ivq file"
        )
    settings, entries = _parse(header)
    start = len(MAGIC) + _FRAME.size + len(header)
    total = start + sum(entry.num_bytes for entry in entries) + len(header) + _FRAME.size + len(END)
    blocks: list[Block | str] = []
    for entry in entries:
        blocks.append(_find_block(content, entry, start, len(content) - total))
        start += entry.num_bytes
    return settings, entries, blocks


def block_name(entries: Sequence[Entry], number: int) -> str:
    """Name a block for messages, such as "block 2 of 10 (images 65 to 128)"."""
    entry = entries[number]
    last = entry.first + entry.num_images - 1
    return f"block {number + 1} of {len(entries)} (images {entry.first} to {last})"


def _body(block: Block) -> bytes:
    names = _deflated(json.dumps(block.names, separators=(",", ":")))
    return _LENGTH.pack(len(names)) + names + block.payload


def _deflated(text: str) -> bytes:
    return zlib.compress(text.encode(), level=9, wbits=-15)


def _inflated(content: bytes, most: int) -> Any:
    """Inflate and parse JSON; ValueError or zlib.error if it is damaged or longer than `most` bytes."""
    inflater = zlib.decompressobj(-15)
    text = inflater.decompress(content, most)
    if not inflater.eof or inflater.unused_data:
        raise ValueError("it does not end where it should")
    return json.loads(text)


def _header(content: bytes, frame: int, is_copy: bool) -> bytes | None:
    """The header after its frame, or the copy before it; None if it is damaged."""
    if not 0 <= frame <= len(content) - _FRAME.size:
        return None
    length, crc = _FRAME.unpack_from(content, frame)
    start = frame - length if is_copy else frame + _FRAME.size
    header = content[max(0, start) : start + length]
    return header if len(header) == length and zlib.crc32(header) == crc else None


def _parse(header: bytes) -> tuple[Settings, list[Entry]]:
    try:
        record = _inflated(header, 4096 + MAX_RATIO * len(header))
        if record.pop("format") != FORMAT:
            raise CodecError("the file has a newer format: read it with a newer isic-vq")
        rows = record.pop("blocks")
        if not 1 <= len(rows) <= len(header) // MIN_ENTRY:
            raise ValueError(f"it lists {len(rows)} blocks in {len(header)} bytes")
        layout = record.pop("layout")
        settings = Settings(layout=None if layout is None else Layout(**layout), **record)
        firsts = accumulate((row[0] for row in rows), initial=1)
        entries = [
            Entry(first, number, CODERS[coder], *rest)
            for first, (number, coder, *rest) in zip(firsts, rows, strict=False)
        ]
        for part in (settings, settings.layout, *entries):
            if part is not None:
                _check_types(part)
        _check_numbers(settings.layout, entries)
    except CodecError:
        raise
    except (zlib.error, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise CodecError(f"the header is not one that isic-vq writes: {str(error)[:200]}") from error
    return settings, entries


def _check_types(part: Any) -> None:
    for field in fields(part):
        if isinstance(field.type, type) and type(getattr(part, field.name)) is not field.type:
            raise ValueError(f"{field.name} is {getattr(part, field.name)!r}")


def _check_numbers(layout: Layout | None, entries: Sequence[Entry]) -> None:
    by_prior = [entry for entry in entries if entry.coder == "prior"]
    if not all(
        1 <= e.num_images <= min(MAX_IMAGES, e.num_bytes) and min(e.crc, e.codes_crc) >= 0 for e in entries
    ):
        raise ValueError("a block's numbers are out of range")
    if layout is None:
        if by_prior:
            raise ValueError("blocks are coded under the prior, whose settings are missing")
    elif not (layout.lanes == max(e.num_images for e in entries) and 1 <= layout.threads <= MAX_THREADS):
        raise ValueError(f"{layout.lanes} lanes and {layout.threads} threads are out of range")


def _find_block(content: bytes, entry: Entry, start: int, shift: int) -> Block | str:
    """The block at `start`, or `shift` bytes after it: by so much the file is longer than its header says."""
    for place in dict.fromkeys((start, start + shift)):
        body = content[max(0, place) : max(0, place + entry.num_bytes)]
        if len(body) == entry.num_bytes and zlib.crc32(body) == entry.crc:
            return _parse_block(body, entry)
    missing = start + entry.num_bytes - len(content)
    if missing > 0:
        return f"the file ends {missing} bytes too early"
    return "its checksum is wrong, so its bytes were altered"


def _parse_block(body: bytes, entry: Entry) -> Block | str:
    try:
        (length,) = _LENGTH.unpack_from(body)
        names = _inflated(body[_LENGTH.size : _LENGTH.size + length], MAX_NAME * entry.num_images)
        if type(names) is not list or len(names) != entry.num_images or {type(n) for n in names} != {str}:
            raise ValueError("its names are not one per image")
    except (zlib.error, struct.error, ValueError, RecursionError) as error:
        return f"it is not one that isic-vq writes: {error}"
    return Block(names, entry.coder, body[_LENGTH.size + length :], entry.codes_crc)


def check_names(names: Sequence[str]) -> None:
    """Raise CodecError if two images have the same name, or a name is no relative path with forward slashes."""
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise CodecError(f"two images are called {twice[0]!r}: expected unique names, so rename one of them")
    for name in names:
        is_wrong_part = any(part in ("", ".", "..") for part in name.split("/"))
        if is_wrong_part or any(character in "\\:" or ord(character) < 32 for character in name):
            raise CodecError(
                f"an image is called {name!r}: expected a relative path without '..', ':' and backslashes"
            )


def png_paths(names: Sequence[str], folder: Path) -> list[Path]:
    """Turn "a/b.jpg" into "a/b.png", or keep all suffixes if two would become the same; no path may leave the folder."""
    check_names(names)
    suffixes = [PurePosixPath(name).suffix for name in names]
    stems = [
        name.removesuffix(suffix) if suffix.lower() in IMAGE_SUFFIXES else name
        for name, suffix in zip(names, suffixes, strict=True)
    ]
    paths = [folder / f"{name}.png" for name in (stems if len(set(stems)) == len(names) else names)]
    root = folder.resolve()
    for name, path in zip(names, paths, strict=True):
        if not path.resolve().is_relative_to(root):  # through a link in the folder
            raise CodecError(f"the image {name!r} would be written outside of {folder.name}")
    return paths
