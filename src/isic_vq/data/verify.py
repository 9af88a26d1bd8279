"""Check a prepared folder against its manifest."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from isic_vq.data.sources.base import count_rows
from isic_vq.data.sources.image_files import file_digest
from isic_vq.data.sources.manifest import IMAGES, MANIFEST, Manifest, read_images, read_shard
from isic_vq.data.splits import SHARED_COLUMNS, SPLITS
from isic_vq.models.image_processing_isic_vq import ImageError, IsicVQImageProcessor


def verify(folder: Path) -> list[str]:
    """Check a prepared folder against its manifest, and return a sentence for each fault.

    Checked are the hash of every shard, every image, the place of every row, duplicate ids, lesions and patients in two
    splits, the manifest's counts, and the attribution that a licence demands.
    """
    manifest, rows = Manifest.read(folder), read_images(folder)
    faults = list(_shard_faults(folder, manifest, rows))
    kept = [row for row in rows if row["split"] != "excluded"]
    ids = Counter(row["isic_id"] for row in kept)
    faults += [f"{name} occurs {number} times" for name, number in ids.items() if number > 1]
    for column in SHARED_COLUMNS:
        splits: dict[str, set[str]] = {}
        for row in kept:
            if row[column]:
                splits.setdefault(row[column], set()).add(row["split"])
        faults += [
            f"{column} {name} is in {' and '.join(sorted(s))}" for name, s in splits.items() if len(s) > 1
        ]
    for split in SPLITS:
        expected = count_rows([row for row in rows if row["split"] == split])
        if manifest.splits.get(split) != expected:
            faults.append(f"{MANIFEST} and {IMAGES} count the images of {split} differently")
    for row in kept:
        if (row["license"] or "").upper().startswith("CC-BY") and not row["attribution"]:
            faults.append(f"{row['isic_id']} is under {row['license']} and has no attribution")
    return faults


def _shard_faults(folder: Path, manifest: Manifest, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    places = {(row["shard"], row["row"]): row["isic_id"] for row in rows if row["shard"]}
    processor = IsicVQImageProcessor(size=manifest.settings["size"])
    for shard in manifest.shards:
        path = folder / shard.file
        if not path.is_file():
            yield f"{shard.file} is missing"
            continue
        if file_digest(path) != shard.sha256:
            yield f"{shard.file} has changed since it was written"
            continue
        num_rows = 0
        for number, (name, image) in enumerate(read_shard(path)):
            num_rows += 1
            listed = places.pop((shard.file, number), None)
            if listed != name:
                yield f"{shard.file}, row {number} is {name}; {IMAGES} lists {listed} there"
            try:
                processor.to_square(image, name=name)
            except ImageError as error:
                yield f"{shard.file}, row {number}: {error}"
        if num_rows != shard.rows:
            yield f"{shard.file} has {num_rows} rows, expected {shard.rows}"
    if places:
        yield f"{IMAGES} lists {len(places)} images that no shard holds, for example {next(iter(places.values()))}"
