"""Generated images as a source: no files, any number, the same on every machine."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from isic_vq.data.classes import Reading
from isic_vq.data.schema import FEATURES, DataError
from isic_vq.data.sources.base import Source, ranges
from isic_vq.data.synthetic_images import synthetic_fingerprint, synthetic_metadata, synthetic_record

IMAGES_PER_PART = 16


@dataclass(frozen=True)
class SyntheticSource(Source):
    """Images of `isic_vq.data.synthetic_images`."""

    num_images: int
    seed: int

    @classmethod
    def from_target(cls, target: str) -> "SyntheticSource":
        match = re.fullmatch(r"(\d{1,7})(?::(\d{1,18}))?", target)  # records of more do not fit into memory
        if match is None or int(match[1]) == 0:
            raise DataError(
                f"'synthetic:{target}' is not synthetic:NUM or synthetic:NUM:SEED, with NUM from 1 to 9999999"
            )
        return cls(int(match[1]), int(match[2] or 0))

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"synthetic:{self.num_images}:{self.seed}"

    def parts(self) -> list[range]:
        return ranges(self.num_images, IMAGES_PER_PART)

    def records_of(self, part: range, reading: Reading, with_images: bool = True) -> Iterator[dict[str, Any]]:
        make = synthetic_record if with_images else synthetic_metadata
        for index in part:
            record = make(index, self.seed)
            yield {**record, "diagnosis": reading.name_class(record["diagnosis"], self.name)}

    def fingerprint(self) -> str:
        return synthetic_fingerprint(self.num_images, self.seed)

    def dataset(self) -> Dataset:
        records = [record for part in self.parts() for record in self.read(part)]
        return Dataset.from_list(records, features=FEATURES)
