"""Open a source of images by its URI, always with the columns `FEATURES`.

    parquet:PATTERN          files, a glob pattern or a directory of parquet files with an `image` column
    folder:DIR               images below a directory, with metadata.csv, metadata.jsonl or class folders
    synthetic:NUM[:SEED]     generated images, for quick starts and tests
    PATH                     a directory of parquet files, another directory, a *.parquet file or pattern

`$VAR` and `${VAR}` are replaced by environment variables, so that a recipe names no machine's folders. What
is told about a source (`describe_source`) is safe to publish: no absolute paths, only counts and a hash.
It does not split, filter or decode, and it does not touch the network.
"""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, concatenate_datasets, load_dataset

from isic_vq.data.folder import file_digest, folder_fingerprint, read_folder
from isic_vq.data.schema import FEATURES, DataError, normalise
from isic_vq.data.synthetic import synthetic_fingerprint, synthetic_metadata, synthetic_records

SCHEMES = "parquet:PATTERN, folder:DIR, synthetic:NUM[:SEED] or a path"

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_SPLIT_PREFIX = re.compile(r"(train|val|test|dev)", re.IGNORECASE)


@dataclass(frozen=True)
class SourceInfo:
    """What may be published about a source.

    Attributes:
        name: the URI with environment variables as written and any other path reduced to its last component.
        fingerprint: sha256 of the content as hex digits; the same wherever the files lie.
        num_images: number of rows, corrupt images included.
        licenses: number of images per licence, "unknown" where a row has none.
        attributions: the distinct attribution lines, sorted.
        diagnoses: number of images per canonical diagnosis.
    """

    name: str
    fingerprint: str
    num_images: int
    licenses: dict[str, int]
    attributions: list[str]
    diagnoses: dict[str, int]


@dataclass(frozen=True)
class _Location:
    """A parsed URI: "parquet" with its files, "folder" with its directory, or "synthetic" with count and seed."""

    scheme: str
    name: str
    paths: tuple[Path, ...] = ()
    num_images: int = 0
    seed: int = 0


def open_source(uri: str, streaming: bool = False) -> Dataset | IterableDataset:
    """Open a source with exactly the columns of `FEATURES`.

    Args:
        uri: see the module's docstring.
        streaming: return an `IterableDataset` that reads rows as they are asked for, in the same order.

    Raises:
        DataError: the URI, its files or one of its rows cannot be used. When streaming, a row's error is
            raised when the row is reached.

    Example:
        >>> open_source("synthetic:16:0").num_rows
        16
    """
    location = _locate(uri)
    if location.scheme == "parquet":
        return _stream(_parquet_records, files=list(location.paths)) if streaming else _read_parquet(location)
    if location.scheme == "synthetic" and streaming:
        return _stream(synthetic_records, num_images=location.num_images, seed=location.seed)
    if location.scheme == "synthetic":
        records = list(synthetic_records(location.num_images, location.seed))
    else:
        records = read_folder(location.paths[0])
    dataset = Dataset.from_list(records, features=FEATURES)
    return dataset.to_iterable_dataset() if streaming else dataset


def _stream(generator: Callable[..., Iterator[dict[str, Any]]], **arguments: Any) -> IterableDataset:
    """Return a stream of what a generator function yields."""
    return IterableDataset.from_generator(generator, gen_kwargs=arguments, features=FEATURES)


def describe_source(uri: str) -> SourceInfo:
    """Return what may be published about a source: name, content hash, and counts of licences and diagnoses.

    Raises:
        DataError: as `open_source`.
    """
    location = _locate(uri)
    if location.scheme == "parquet":
        rows = _read_parquet(location).remove_columns("image").to_list()
        digests = sorted(file_digest(path) for path in location.paths)
        fingerprint = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    elif location.scheme == "folder":
        rows = read_folder(location.paths[0])
        fingerprint = folder_fingerprint(location.paths[0])
    else:
        rows = [synthetic_metadata(index, location.seed) for index in range(location.num_images)]
        fingerprint = synthetic_fingerprint(location.num_images, location.seed)
    return SourceInfo(
        name=location.name,
        fingerprint=fingerprint,
        num_images=len(rows),
        licenses=_counts(row["license"] or "unknown" for row in rows),
        attributions=sorted({row["attribution"] for row in rows if row["attribution"]}),
        diagnoses=_counts(row["diagnosis"] for row in rows),
    )


def _counts(values: Any) -> dict[str, int]:
    """Return how often each value occurs, sorted by value."""
    return dict(sorted(Counter(values).items()))


def _locate(uri: str) -> _Location:
    """Parse a URI and find its files."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(.*)", uri, re.DOTALL)
    scheme, target = (match[1].lower(), match[2]) if match else ("", uri)
    if scheme not in ("", "parquet", "folder", "synthetic"):
        raise DataError(
            f"{uri!r} has the unknown scheme {scheme!r}. Expected {SCHEMES}; download remote files first."
        )
    if not target.strip():
        raise DataError(f"{uri!r} names nothing. Expected {SCHEMES}.")
    if scheme == "synthetic":
        return _locate_synthetic(uri, target)
    path = os.path.expanduser(_expand_variables(target))
    if not scheme:
        has_parquet = os.path.isdir(path) and any(Path(path).glob("*.parquet"))
        scheme = "folder" if os.path.isdir(path) and not has_parquet else "parquet"
    name = f"{scheme}:{_public_path(target)}"
    if scheme == "parquet":
        return _Location(scheme, name, paths=_parquet_files(path, name))
    if not os.path.isdir(path):
        raise DataError(f"{name} is not a directory. Expected folder:DIR with images in DIR or below.")
    return _Location(scheme, name, paths=(Path(path),))


def _locate_synthetic(uri: str, target: str) -> _Location:
    """Parse NUM[:SEED]."""
    match = re.fullmatch(r"(\d+)(?::(\d+))?", target)
    if match is None or int(match[1]) == 0:
        raise DataError(
            f"{uri!r} is not synthetic:NUM or synthetic:NUM:SEED with a positive NUM, such as synthetic:64:0."
        )
    num_images, seed = int(match[1]), int(match[2] or 0)
    return _Location("synthetic", f"synthetic:{num_images}:{seed}", num_images=num_images, seed=seed)


def _expand_variables(path: str) -> str:
    """Replace environment variables; unlike `os.path.expandvars`, an unset one is an error."""

    def value(match: re.Match[str]) -> str:
        variable = match[1] or match[2]
        if not os.environ.get(variable):
            raise DataError(
                f"{path!r} needs the environment variable {variable}, which is not set. Set it to a folder."
            )
        return os.environ[variable]

    return _VARIABLE.sub(value, path)


def _public_path(path: str) -> str:
    """Return a path that tells nothing about the machine: without its folders, unless a variable stands for them."""
    if _VARIABLE.match(path):
        return path
    return Path(path).name or Path(path).resolve().name


def _parquet_files(path: str, name: str) -> tuple[Path, ...]:
    """Return the files of a parquet file, directory or pattern, sorted."""
    if os.path.isdir(path):
        files = sorted(Path(path).glob("*.parquet"))
        splits = sorted({match[0].lower() for file in files if (match := _SPLIT_PREFIX.match(file.name))})
        if len(splits) > 1:
            raise DataError(
                f"{name} holds several splits ({', '.join(splits)}). Name one by a pattern: {splits[0]}*.parquet."
            )
    else:
        files = [Path(path)] if os.path.isfile(path) else sorted(map(Path, glob.glob(path, recursive=True)))
    files = [file for file in files if file.is_file()]
    if not files:
        raise DataError(
            f"Nothing matches {name}. Expected a parquet file, a pattern or a directory of *.parquet files."
        )
    columns: dict[str, Path] = {}
    for file in files:
        columns.setdefault(", ".join(sorted(_column_names(file))), file)
    if len(columns) > 1:
        listed = "; ".join(f"{file.name}: {names}" for names, file in columns.items())
        raise DataError(
            f"The files of {name} have different columns ({listed}). Open them as separate sources."
        )
    files = [file for file in files if pyarrow.parquet.read_metadata(file).num_rows > 0]
    if not files:
        raise DataError(f"{name} has no rows. Expected one row per image.")
    return tuple(files)


def _column_names(file: Path) -> list[str]:
    """Return the columns of a parquet file, which must have `image` among them."""
    try:
        columns = pyarrow.parquet.read_schema(file).names
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file.name} is not a readable parquet file: {error}") from error
    if "image" not in columns:
        raise DataError(
            f"{file.name} has no column image, only {', '.join(columns)}. Rename the column of the images."
        )
    return columns


def _read_parquet(location: _Location) -> Dataset:
    """Read the files without copying or decoding an image."""
    files = [glob.escape(str(file)) for file in location.paths]
    table = load_dataset("parquet", data_files=files, split="train")
    images = table.select_columns("image").cast_column("image", Image())
    paths = pyarrow.compute.struct_field(images.data.column("image"), "path").to_pylist()
    names = _class_names(table.features)
    rows = []
    for index, row in enumerate(table.remove_columns("image").to_list()):
        rows.append(normalise({**row, "image": {"path": paths[index]}}, f"row {index}", names))
        del rows[-1]["image"]
    metadata = Dataset.from_list(rows, features=Features({k: v for k, v in FEATURES.items() if k != "image"}))
    return concatenate_datasets([images, metadata], axis=1)


def _parquet_records(files: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield the normalised rows of parquet files, images as they are stored, a few rows in memory at a time.

    This reads by pyarrow because a stream of `datasets` over parquet that is left early hangs at the
    interpreter's exit. An image's path is dropped where there are bytes: `datasets` prefers a file of that name
    in the working directory, which may be another image.
    """
    for path in files:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = _class_names(Features.from_arrow_schema(file.schema_arrow))
            row = 0
            for batch in file.iter_batches(batch_size=64, use_threads=False):
                for record in batch.to_pylist():
                    normal = normalise(record, f"{path.name}, row {row}", names)
                    yield {**normal, "image": _stored_image(normal["image"])}
                    row += 1


def _stored_image(image: dict[str, Any] | bytes | None) -> dict[str, Any] | bytes | None:
    """Return an image's bytes, its path where it has no bytes, or None where it has neither."""
    if not isinstance(image, dict):
        return image
    if image["bytes"] is not None:
        return image["bytes"]
    return image if image["path"] is not None else None


def _class_names(features: Features) -> dict[str, list[str]]:
    """Return the names behind the ids of every `ClassLabel` column."""
    return {column: feature.names for column, feature in features.items() if isinstance(feature, ClassLabel)}
