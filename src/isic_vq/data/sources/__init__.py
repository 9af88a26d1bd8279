"""Open a source of images by its URI, always with the columns `FEATURES`.

    isic-archive[:FILTERS]   the ISIC archive
    challenge:YEAR[:PART]    the archives of an ISIC challenge
    hub:OWNER/NAME           a data set on the Hugging Face Hub; @REVISION?KEY=VALUE&... say which and how it is read
    webdataset:PATTERN       tar files, local or http(s); {000..009} and {a,b} stand for several
    parquet:PATTERN          files, a glob pattern or a directory of parquet files with an `image` column
    folder:DIR               images below a directory, with a table, JSON files or class folders
    prepared:DIR[:SPLIT]     what `isic-vq data prepare` has written
    synthetic:NUM[:SEED]     generated images, for quick starts and tests
    PATH                     a prepared directory; a file, directory or pattern of parquet or tar files; a folder

`$VAR` and `${VAR}` are replaced by environment variables, so that a recipe names no machine's folders.
To add a source, write a `Source` with a `from_target` that parses what follows the scheme, and enter it in `SOURCES`
and in `uri.SCHEMES`.
"""

from collections.abc import Callable

from datasets import Dataset, IterableDataset

from isic_vq.data.classes import Classes
from isic_vq.data.sources.archive import ArchiveSource
from isic_vq.data.sources.base import Source, SourceInfo
from isic_vq.data.sources.challenge import ChallengeSource
from isic_vq.data.sources.folder import FolderSource
from isic_vq.data.sources.hub import HubSource
from isic_vq.data.sources.parquet import ParquetSource
from isic_vq.data.sources.prepared import PreparedSource
from isic_vq.data.sources.synthetic import SyntheticSource
from isic_vq.data.sources.webdataset import WebDatasetSource
from isic_vq.data.uri import parse_uri

__all__ = ["Source", "SourceInfo", "describe_source", "find_source", "open_source"]

SOURCES: dict[str, Callable[[str], Source]] = {
    "isic-archive": ArchiveSource.from_target,
    "challenge": ChallengeSource.from_target,
    "hub": HubSource.from_target,
    "webdataset": WebDatasetSource.from_target,
    "prepared": PreparedSource.from_target,
    "parquet": ParquetSource.from_target,
    "folder": FolderSource.from_target,
    "synthetic": SyntheticSource.from_target,
}


def open_source(
    uri: str, streaming: bool = False, classes: Classes | None = None
) -> Dataset | IterableDataset:
    """Open a source with exactly the columns of `FEATURES`; `streaming` reads rows on demand, in the same order.

    Raises:
        DataError: the URI, its files or a row cannot be used, or the source can only be streamed. In a stream, a row's error
            is raised when the row is reached.

    Examples:
        >>> open_source("synthetic:16:0").num_rows
        16
    """
    source = find_source(uri, classes)
    return source.stream() if streaming else source.dataset()


def describe_source(uri: str) -> SourceInfo:
    """Describe a source for publication; raises DataError like `open_source`."""
    return find_source(uri).describe()


def find_source(uri: str, classes: Classes | None = None) -> Source:
    """Find the source of a URI; DataError if its scheme is unknown, or it names nothing.

    `classes` are the names that labels may have; by default those that the source itself declares, else ISIC's.
    """
    scheme, target = parse_uri(uri, SOURCES)
    source = SOURCES[scheme](target)
    return source if classes is None else source.with_classes(classes)
