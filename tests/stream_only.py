"""A source that can only be streamed."""

import functools
from dataclasses import dataclass

import numpy as np

from isic_vq.data.sources import Source
from isic_vq.data.synthetic_images import synthetic_metadata, synthetic_record

record_of = functools.cache(lambda index: synthetic_record(index, 0))


@dataclass(frozen=True)
class StreamOnly(Source):
    """Synthetic images in parts of uneven sizes, without random access; one of them may be corrupt."""

    sizes: tuple[int, ...] = (7, 1, 12, 3, 9, 8)
    corrupt: int = -1
    name = "streamonly:test"

    def parts(self):
        ends = np.cumsum(self.sizes).tolist()
        return [range(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def records_of(self, part, reading, with_images=True):
        for index in part:
            yield {**record_of(index), "image": b"no image"} if index == self.corrupt else record_of(index)

    def rows(self, reading):
        return (synthetic_metadata(index, 0) for index in range(sum(self.sizes)))

    def fingerprint(self):
        return "0" * 64
