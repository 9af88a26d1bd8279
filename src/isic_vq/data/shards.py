"""One shard of generated images: a parquet file that `datasets` reads, or a WebDataset tar.

The same samples give the same bytes: nothing in a file tells when, where or by which process it was written.
Sources: the parquet layout of Hugging Face's image data sets; the WebDataset convention, where the members of
one sample share a name (https://github.com/webdataset/webdataset).
It does not generate: `isic_vq.generate` says which images a shard holds.
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
ROW_GROUP_SIZE = 128  # rows; what a reader that wants one image has to load


@dataclass(frozen=True)
class Sample:
    """A generated image and what made it.

    Attributes:
        image: a PNG file.
        label: the diagnosis it was asked for; None if none was.
        seed: its noise depends on the seed and the index.
        index: its place in the whole set.
        codes: in raster order, each below 2**16.
        model: name of the model.
        isic_vq: version of this package.
        run: fingerprint of all settings, the same in all shards of a set.
    """

    image: bytes
    label: str | None
    seed: int
    index: int
    codes: list[int]
    model: str
    isic_vq: str
    run: str

    @property
    def name(self) -> str:
        """Name of its files, without suffix."""
        return f"{self.index:08d}"


def shard_name(number: int, num_shards: int, shard_format: str) -> str:
    """File name of a shard, such as `images-00000-of-00100.parquet`."""
    return f"images-{number:05d}-of-{num_shards:05d}{SUFFIXES[shard_format]}"


def to_png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of pixels `(H, W, 3)`."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_shard(path: Path, samples: Sequence[Sample], class_names: Sequence[str]) -> None:
    """Write samples as parquet or, if `path` ends in .tar, as WebDataset; whole or not at all.

    Parquet has the columns `image` (bytes and path), `label` (a `ClassLabel`, null where no diagnosis was asked
    for), `seed`, `index`, `codes` (uint16), `model`, `isic_vq` and `run`, and the features that make
    `datasets.load_dataset("parquet", ...)` yield PIL images. A tar has a `.png` and a `.json` of the rest per sample.

    Args:
        path: the file, which is replaced.
        samples: at least one.
        class_names: the diagnoses that a label may be, in the order of their ids.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    content = (
        tar_bytes(_members(samples)) if path.suffix == ".tar" else _to_parquet(samples, list(class_names))
    )
    write_atomically(path, content)


def read_shard(path: Path) -> list[Sample]:
    """Read a shard back, and check that every image is as it was written.

    Raises:
        DataError: it is damaged, or no shard.
        OSError: it cannot be read.
    """
    try:
        samples = list(_from_tar(path) if path.suffix == ".tar" else _from_parquet(path))
        for sample in samples:
            with PIL.Image.open(io.BytesIO(sample.image), formats=["PNG"]) as image:
                image.verify()  # checksums of all its parts
    except (pyarrow.ArrowException, tarfile.TarError, KeyError, TypeError, *PILLOW_ERRORS) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file itself, not what is in it
        raise DataError(f"{path} is not a whole shard ({type(error).__name__}: {error})") from error
    return samples


def _features(class_names: list[str], num_codes: int) -> Features:
    """The columns of a parquet shard; `num_codes` is the length of a grid."""
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
    return parquet_bytes(pyarrow.Table.from_pylist(rows, schema=schema), ROW_GROUP_SIZE)


def _from_parquet(path: Path) -> Iterator[Sample]:
    with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
        names = Features.from_arrow_schema(file.schema_arrow)["label"].names
        for row in file.read().to_pylist():
            label = None if row["label"] is None else names[row["label"]]
            yield Sample(**{**row, "image": row["image"]["bytes"], "label": label})


def _members(samples: Sequence[Sample]) -> Iterator[tuple[str, bytes]]:
    for sample in samples:
        about = asdict(sample)
        yield f"{sample.name}.png", about.pop("image")
        yield f"{sample.name}.json", json.dumps(about).encode()


def _from_tar(path: Path) -> Iterator[Sample]:
    contents = tar_contents(path)
    for name, content in contents.items():
        if name.endswith(".json"):
            yield Sample(image=contents[name.removesuffix("json") + "png"], **json.loads(content))


def parquet_bytes(table: pyarrow.Table, row_group_size: int) -> bytes:
    """A parquet file; the same table gives the same bytes."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(
        table, sink, compression="zstd", row_group_size=row_group_size, write_page_checksum=True
    )
    return sink.getvalue().to_pybytes()


def tar_bytes(members: Iterable[tuple[str, bytes]]) -> bytes:
    """A tar of names and contents; the same members give the same bytes."""
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
