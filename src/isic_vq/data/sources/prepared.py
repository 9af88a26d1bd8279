"""One split of a folder that `isic-vq data prepare` has finished: prepared:DIR:SPLIT, or DIR alone if it has one split."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from isic_vq.data.classes import Classes, Reading
from isic_vq.data.schema import FEATURES, DataError
from isic_vq.data.sources.base import Source
from isic_vq.data.sources.folder import file_digest
from isic_vq.data.sources.manifest import MANIFEST, Manifest, read_images
from isic_vq.data.sources.parquet import ParquetSource
from isic_vq.data.sources.webdataset import WebDatasetSource
from isic_vq.data.splits import SPLITS
from isic_vq.data.uri import expand_path, public_path


@dataclass(frozen=True)
class PreparedSource(Source):
    """The images of a split.

    Attributes:
        name: as `Source` has it.
        folder: the prepared folder.
        split: "train", "validation" or "test".
    """

    name: str
    folder: Path
    split: str

    @classmethod
    def from_target(cls, target: str) -> "PreparedSource":
        """Find a folder and its split.

        Raises:
            DataError: the folder is not finished, has no such split, several to choose from, or lacks a shard.
        """
        path, _, split = target.rpartition(":")
        if split not in SPLITS[:3]:
            path, split = target, ""
        folder = Path(expand_path(path))
        manifest = Manifest.read(folder)
        present = [name for name in SPLITS[:3] if manifest.of_split(name)]
        if not split and len(present) == 1:
            split = present[0]
        if split not in present:
            raise DataError(
                f"prepared:{public_path(target)} names {'the split ' + split if split else 'no split'}: expected "
                f"prepared:DIR:SPLIT with {' or '.join(present)}"
            )
        for shard in manifest.of_split(split):
            file = folder / shard.file
            if not file.is_file() or file.stat().st_size != shard.bytes:
                raise DataError(
                    f"{folder.name}/{shard.file} is missing or not whole: isic-vq data verify tells what else is, and "
                    "isic-vq data prepare makes the folder again"
                )
        source = cls(f"prepared:{public_path(path)}:{split}", folder, split)
        return source if manifest.classes is None else source.with_classes(Classes(tuple(manifest.classes)))

    @property
    def snapshot(self) -> str | None:  # type: ignore[override]
        """When its sources were fixed, of those that say so."""
        times = dict.fromkeys(s["snapshot"] for s in Manifest.read(self.folder).sources if s["snapshot"])
        return ", ".join(times) or None

    @property
    def manifest_sha256(self) -> str:  # type: ignore[override]
        """Of the folder's manifest."""
        return file_digest(self.folder / MANIFEST)

    @property
    def shard_sizes(self) -> list[int]:
        """Rows of each shard, in order."""
        return [shard.rows for shard in Manifest.read(self.folder).of_split(self.split)]

    def parts(self) -> list[Any]:
        """Those of the files."""
        return self._files().parts()

    def records_of(self, part: Any, reading: Reading) -> Iterator[dict[str, Any]]:
        """The records of a part of the files."""
        return self._files().records_of(part, reading)

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        """The rows of the split's images, in the order of the shards."""
        columns = [name for name in FEATURES if name != "image"]
        rows = read_images(self.folder, [*columns, "split", "shard", "row"])
        own = sorted((r for r in rows if r["split"] == self.split), key=lambda r: (r["shard"], r["row"]))
        for row in own:
            label = reading.name_class(row["diagnosis"], f"{self.name}, {row['isic_id']}")
            yield {**{name: row[name] for name in columns}, "diagnosis": label}

    def fingerprint(self) -> str:
        """Of the shards' contents."""
        digests = [shard.sha256 for shard in Manifest.read(self.folder).of_split(self.split)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def dataset(self) -> Dataset:
        """All records."""
        return self._files().dataset()

    def _files(self) -> ParquetSource | WebDatasetSource:
        files = [self.folder / shard.file for shard in Manifest.read(self.folder).of_split(self.split)]
        if files[0].suffix == ".tar":
            return WebDatasetSource(self.name, tuple(map(str, files))).with_classes(self.classes)
        return ParquetSource(self.name, tuple(files)).with_classes(self.classes)
