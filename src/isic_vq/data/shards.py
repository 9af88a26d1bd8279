"""Shards of generated images: parquet files that `datasets` reads, or WebDataset tars.

The same samples give the same bytes: a file holds no time, place or process.
Sources: the parquet layout of Hugging Face's image data sets; the WebDataset convention, where the members of one sample
share a name (https://github.com/webdataset/webdataset).
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Features, Image, List, Value
from numpy.typing import NDArray

from isic_vq.data.schema import DataError
from isic_vq.files import write_atomically
from isic_vq.models.image_processing_isic_vq import PILLOW_ERRORS

SUFFIXES = {"parquet": ".parquet", "webdataset": ".tar"}
SHARD_PATTERN = "images-*-of-*"
ROW_GROUP_SIZE = 128  # rows that are loaded to read one image


@dataclass(frozen=True)
class Sample:
    """A generated image and its origin."""

    image: bytes  # a PNG file
    label: str | None  # the requested diagnosis; None if unconditional
    seed: int  # of the whole set; the image depends on seed and index
    index: int  # number in the whole set
    codes: list[int]  # in raster order, each below 2**16
    model: str  # name of the model
    isic_vq: str  # version of this package
    run: str  # fingerprint of all settings, the same in all shards of a set

    @property
    def name(self) -> str:
        return f"{self.index:08d}"


def shard_name(number: int, num_shards: int, shard_format: str) -> str:
    """The file name of a shard, such as `images-00000-of-00100.parquet`."""
    return f"images-{number:05d}-of-{num_shards:05d}{SUFFIXES[shard_format]}"


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode pixels `(H, W, 3)` as a PNG file."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_shard(path: Path, samples: Sequence[Sample], class_names: Sequence[str]) -> None:
    """Write samples as parquet or, if `path` ends in .tar, as WebDataset, atomically.

    Parquet has a column for each field of `Sample`, `label` as a `ClassLabel` of `class_names`, and the features with which
    `datasets.load_dataset("parquet", ...)` yields PIL images. A tar has a `.png` and a `.json` per sample.
    """
    content = (
        tar_bytes(_members(samples)) if path.suffix == ".tar" else _to_parquet(samples, list(class_names))
    )
    write_atomically(path, content)


def read_shard(path: Path) -> list[Sample]:
    """Read a shard and verify the checksums of its images; DataError if it is damaged or no shard."""
    try:
        samples = list(_from_tar(path) if path.suffix == ".tar" else _from_parquet(path))
        for sample in samples:
            with PIL.Image.open(io.BytesIO(sample.image), formats=["PNG"]) as image:
                image.verify()
    except (pyarrow.ArrowException, tarfile.TarError, KeyError, TypeError, *PILLOW_ERRORS) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of the file, not of its content
        raise DataError(f"{path} is not a whole shard ({type(error).__name__}: {error})") from error
    return samples


def _features(class_names: list[str], num_codes: int) -> Features:
    return Features(
        {
            "image": Image(),
            "label": ClassLabel(names=class_names),
            "seed": Value("int64"),
            "index": Value("int64"),
            "codes": List(Value("uint16"), length=num_codes),
            "model": Value("string"),
            "isic_vq": Value("string"),
            "run": Value("string"),
        }
    )


def write_records(records: Any, path: Path) -> None:
    """Write a `datasets.Dataset` as parquet, with the bytes of its images, atomically."""
    from datasets.table import embed_table_storage

    content = io.BytesIO()
    embedded = records.with_format("arrow").map(embed_table_storage, batched=True, keep_in_memory=True)
    embedded.with_format(None).to_parquet(content)
    write_atomically(path, content.getvalue())


def _to_parquet(samples: Sequence[Sample], class_names: list[str]) -> bytes:
    ids = {name: index for index, name in enumerate(class_names)}
    rows: list[dict[str, Any]] = [
        {
            **asdict(sample),
            "image": {"bytes": sample.image, "path": f"{sample.name}.png"},
            "label": None if sample.label is None else ids[sample.label],
        }
        for sample in samples
    ]
    schema = _features(class_names, len(samples[0].codes)).arrow_schema
    table = pyarrow.Table.from_pylist(rows, schema=schema)
    return parquet_bytes(table, row_group_size=ROW_GROUP_SIZE, write_page_checksum=True)


def _from_parquet(path: Path) -> Iterator[Sample]:
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        names = Features.from_arrow_schema(file.schema_arrow)["label"].names
        for row in file.read().to_pylist():
            label = None if row["label"] is None else names[row["label"]]
            yield Sample(**{**row, "image": row["image"]["bytes"], "label": label})


def _members(samples: Sequence[Sample]) -> Iterator[tuple[str, bytes]]:
    for sample in samples:
        values = asdict(sample)
        yield f"{sample.name}.png", values.pop("image")
        yield f"{sample.name}.json", json.dumps(values).encode()


def _from_tar(path: Path) -> Iterator[Sample]:
    contents = tar_contents(path)
    for name, content in contents.items():
        if name.endswith(".json"):
            yield Sample(image=contents[name.removesuffix("json") + "png"], **json.loads(content))


def parquet_bytes(table: pyarrow.Table, **options: Any) -> bytes:
    """Encode a table as a parquet file, by default with zstd; the same table gives the same bytes."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, **{"compression": "zstd", **options})
    return sink.getvalue().to_pybytes()


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """Encode names and contents as a tar; the same members give the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)  # time 0, user 0 and group 0
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def tar_contents(path: Path) -> dict[str, bytes]:
    """The contents of a tar's files by name."""
    with tarfile.open(path, "r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
