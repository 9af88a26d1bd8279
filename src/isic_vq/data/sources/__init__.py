"""Open a source of images by its URI, always with the columns `FEATURES`.

    parquet:PATTERN          files, a glob pattern or a directory of parquet files with an `image` column
    folder:DIR               images below a directory, with metadata.csv, metadata.jsonl or class folders
    synthetic:NUM[:SEED]     generated images, for quick starts and tests
    PATH                     a directory of parquet files, another directory, a *.parquet file or pattern

`$VAR` and `${VAR}` are replaced by environment variables, so that a recipe names no machine's folders. What
is told about a source (`describe_source`) is safe to publish: no absolute paths, only counts and a hash.
It does not split, filter or decode.
"""

import os
import re
from pathlib import Path

from datasets import Dataset, IterableDataset

from isic_vq.data.schema import DataError
from isic_vq.data.sources.base import Source, SourceInfo
from isic_vq.data.sources.folder import FolderSource
from isic_vq.data.sources.parquet import ParquetSource, find_parquet_files
from isic_vq.data.sources.synthetic import SyntheticSource
from isic_vq.data.sources.uri import expand_path, public_path

__all__ = ["Source", "SourceInfo", "describe_source", "find_source", "open_source"]

SCHEMES = "parquet:PATTERN, folder:DIR, synthetic:NUM[:SEED] or a path"


def open_source(uri: str, streaming: bool = False) -> Dataset | IterableDataset:
    """Open a source with exactly the columns of `FEATURES`.

    Args:
        uri: see the module's docstring.
        streaming: return an `IterableDataset` that reads rows as they are asked for, in the same order.

    Raises:
        DataError: the URI, its files or one of its rows cannot be used, or the source can only be streamed. When
            streaming, a row's error is raised when the row is reached.

    Example:
        >>> open_source("synthetic:16:0").num_rows
        16
    """
    source = find_source(uri)
    return source.stream() if streaming else source.dataset()


def describe_source(uri: str) -> SourceInfo:
    """What may be published about a source: name, content hash, and counts of licences and diagnoses.

    Raises:
        DataError: as `open_source`.
    """
    return find_source(uri).describe()


def find_source(uri: str) -> Source:
    """Parse a URI and find what it names.

    Raises:
        DataError: the URI is not one, or names nothing.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):(.*)", uri, re.DOTALL)
    scheme, target = (match[1].lower(), match[2]) if match else ("", uri)
    if scheme not in ("", "parquet", "folder", "synthetic"):
        raise DataError(f"{uri!r} has the unknown scheme {scheme!r}. Expected {SCHEMES}.")
    if not target.strip():
        raise DataError(f"{uri!r} names nothing. Expected {SCHEMES}.")
    if scheme == "synthetic":
        return SyntheticSource.from_target(target)
    path = expand_path(target)
    if not scheme:
        has_parquet = os.path.isdir(path) and any(Path(path).glob("*.parquet"))
        scheme = "folder" if os.path.isdir(path) and not has_parquet else "parquet"
    name = f"{scheme}:{public_path(target)}"
    if scheme == "parquet":
        return ParquetSource(name, find_parquet_files(path, name))
    if not os.path.isdir(path):
        raise DataError(f"{name} is not a directory. Expected folder:DIR with images in DIR or below.")
    return FolderSource(name, Path(path))
