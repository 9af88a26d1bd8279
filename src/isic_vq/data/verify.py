"""Check a prepared folder against its manifest, byte by byte and rule by rule."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from isic_vq.data.sources.base import count_rows
from isic_vq.data.sources.folder import file_digest
from isic_vq.data.sources.manifest import IMAGES, MANIFEST, Manifest, read_images, read_shard
from isic_vq.data.splits import SHARED_COLUMNS, SPLITS
from isic_vq.models.image_processing_isic_vq import ImageError, IsicVQImageProcessor


def verify(folder: Path) -> list[str]:
    """Check a prepared folder against its manifest; returns what is wrong, one sentence each.

    Every shard's hash, every image's pixels, every row's place; ids once; no lesion and no patient in two splits;
    the manifest's counts; an attribution beside every licence that asks for one.

    Raises:
        DataError: there is no manifest, or the rows cannot be read.
    """
    manifest, rows = Manifest.read(folder), read_images(folder)
    wrong = list(_wrong_shards(folder, manifest, rows))
    kept = [row for row in rows if row["split"] != "excluded"]
    ids = Counter(row["isic_id"] for row in kept)
    wrong += [f"{name} is there {number} times" for name, number in ids.items() if number > 1]
    for column in SHARED_COLUMNS:
        sides: dict[str, set[str]] = {}
        for row in kept:
            if row[column]:
                sides.setdefault(row[column], set()).add(row["split"])
        wrong += [
            f"{column} {name} is in {' and '.join(sorted(s))}" for name, s in sides.items() if len(s) > 1
        ]
    for split in SPLITS:
        expected = count_rows([row for row in rows if row["split"] == split])
        if manifest.splits.get(split) != expected:
            wrong.append(f"{MANIFEST} does not count the images of {split} as {IMAGES} has them")
    for row in kept:
        if (row["license"] or "").upper().startswith("CC-BY") and not row["attribution"]:
            wrong.append(f"{row['isic_id']} is under {row['license']} and names nobody")
    return wrong


def _wrong_shards(folder: Path, manifest: Manifest, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What is wrong with the shards' files and what is in them."""
    places = {(row["shard"], row["row"]): row["isic_id"] for row in rows if row["shard"]}
    processor = IsicVQImageProcessor(size=manifest.settings["size"])
    for shard in manifest.shards:
        path = folder / shard.file
        if not path.is_file():
            yield f"{shard.file} is missing"
            continue
        if file_digest(path) != shard.sha256:
            yield f"{shard.file} has other bytes than when it was written"
            continue
        found = 0
        for number, (name, image) in enumerate(read_shard(path)):
            found += 1
            if places.pop((shard.file, number), None) != name:
                yield f"{shard.file}, row {number} is {name}, and {IMAGES} says another one"
            try:
                processor.to_square(image, name=name)
            except ImageError as error:
                yield f"{shard.file}, row {number}: {error}"
        if found != shard.rows:
            yield f"{shard.file} has {found} rows, expected {shard.rows}"
    if places:
        yield f"{IMAGES} names {len(places)} images that no shard holds, for example {next(iter(places.values()))}"
