"""A split of a folder that `isic-vq data prepare` has finished: prepared:DIR:SPLIT, or DIR if it has only one."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from isic_vq.data.classes import Classes, Reading
from isic_vq.data.schema import FEATURES, DataError
from isic_vq.data.sources.base import Source
from isic_vq.data.sources.image_files import file_digest
from isic_vq.data.sources.manifest import MANIFEST, Manifest, read_images
from isic_vq.data.sources.parquet import ParquetSource
from isic_vq.data.sources.webdataset import WebDatasetSource
from isic_vq.data.splits import SPLITS
from isic_vq.data.uri import expand_path, public_path


@dataclass(frozen=True)
class PreparedSource(Source):
    """The images of one split, "train", "validation" or "test", of a prepared folder."""

    name: str
    folder: Path
    split: str

    @classmethod
    def from_target(cls, target: str) -> "PreparedSource":
        """Find a finished folder and one of its splits, and check that no shard is missing or truncated."""
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
                    f"{folder.name}/{shard.file} is missing or truncated: isic-vq data prepare makes the folder again"
                )
        source = cls(f"prepared:{public_path(path)}:{split}", folder, split)
        return source if manifest.classes is None else source.with_classes(Classes(tuple(manifest.classes)))

    @property
    def snapshot(self) -> str | None:  # type: ignore[override]
        times = dict.fromkeys(s["snapshot"] for s in self._manifest.sources if s["snapshot"])
        return ", ".join(times) or None

    @property
    def manifest_sha256(self) -> str:  # type: ignore[override]
        return file_digest(self.folder / MANIFEST)

    @property
    def shard_sizes(self) -> list[int]:
        return [shard.rows for shard in self._manifest.of_split(self.split)]

    def parts(self) -> list[Any]:
        return self._files().parts()

    def records_of(self, part: Any, reading: Reading, with_images: bool = True) -> Iterator[dict[str, Any]]:
        return self._files().records_of(part, reading, with_images)

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        """Read the rows from `images.parquet`, in the order of the shards."""
        columns = [name for name in FEATURES if name != "image"]
        rows = read_images(self.folder, [*columns, "split", "shard", "row"])
        rows = [row for row in rows if row["split"] == self.split]
        for row in sorted(rows, key=lambda row: (row["shard"], row["row"])):
            label = reading.name_class(row["diagnosis"], f"{self.name}, {row['isic_id']}")
            yield {**{name: row[name] for name in columns}, "diagnosis": label}

    def fingerprint(self) -> str:
        digests = [shard.sha256 for shard in self._manifest.of_split(self.split)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def dataset(self) -> Dataset:
        return self._files().dataset()

    @property
    def _manifest(self) -> Manifest:
        return Manifest.read(self.folder)

    def _files(self) -> ParquetSource | WebDatasetSource:
        files = [self.folder / shard.file for shard in self._manifest.of_split(self.split)]
        if files[0].suffix == ".tar":
            return WebDatasetSource(self.name, tuple(map(str, files))).with_classes(self.classes)
        return ParquetSource(self.name, tuple(files)).with_classes(self.classes)
