"""Data sets on the Hugging Face Hub: any repository with a column of images, at one commit.

    hub:OWNER/NAME[@REVISION][?KEY=VALUE&...]

    split=NAME, config=NAME      which rows; by default the split train of the only configuration
    image=COLUMN, dx and so on   which column holds `image` or another column of `FEATURES`, where its name does
                                 not tell (`COLUMN_ALIASES`)
    classes=MEL,NV,...           the classes, in the order of the integers that a column of them may hold
    set.license=TEXT, ...        the same value in every row; {COLUMN} in it stands for that column's

`datasets` finds the files of a split; no code of a repository is run. The files are parquet, read row group by row group
with range requests: processes share even a single large file, and metadata are read without the images beside them. Of
repositories in other formats (loose images, tars, CSV), the Hub keeps a parquet copy under the revision
refs/convert/parquet, which is read by its own layout: CONFIG/SPLIT/0000.parquet.
Differs from `load_dataset`: after a lost connection only the row group that was being read is read again.
"""

import functools
import hashlib
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset, Features
from datasets.exceptions import FileNotFoundDatasetsError
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from isic_vq.data.classes import Classes, Reading
from isic_vq.data.schema import DataError, named_classes, normalise
from isic_vq.data.sources.base import Source, cached_dataset
from isic_vq.data.sources.hub_columns import KNOWN_SETS, Columns, check_columns, class_names_of, parse_query
from isic_vq.data.sources.parquet import Part, read_group, row_groups
from isic_vq.models.upload import HubError, hub_errors

logger = logging.getLogger(__name__)

READ_SIZE = 8 << 20  # bytes of one range request for images, at most
READ_AHEAD = 64 << 10  # bytes read beyond an image column, which usually hold the group's other columns
RETRIES = 4  # without progress, each after five of huggingface_hub's own
CONVERTED = "refs/convert/parquet"
_TARGET = re.compile(r"([\w.-]+/[\w.-]+)(?:@([^?]+))?(?:\?(.*))?", re.DOTALL)

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Connection:
    """Requests about one repository, which are repeated where that may help."""

    name: str  # what messages call the source
    repo: str  # OWNER/NAME
    revision: str | None  # None for main

    def ask(self, question: Callable[[], Answer]) -> Answer:
        """Return one answer; errors are as in `resumed`."""
        return next(self.resumed(lambda: iter([question()])))

    def resumed(self, rows: Callable[[], Iterator[Answer]]) -> Iterator[Answer]:
        """Yield the rows of `rows()`; after a lost connection, at most `RETRIES` times, call it again and skip those yielded."""
        done, failures = 0, 0
        while True:
            try:
                for row in itertools.islice(rows(), done, None):
                    yield row
                    done, failures = done + 1, 0
                return
            except (OSError, HTTPError, pyarrow.ArrowException) as error:
                failures += 1
                if failures > RETRIES or not _may_pass(error):
                    raise self._explained(error) from None
                logger.warning(
                    "%s: %s while reading, try %d of %d", self.name, type(error).__name__, failures, RETRIES
                )
                time.sleep(min(2**failures, 30))

    def _explained(self, error: BaseException) -> DataError:
        try:
            with hub_errors(f"datasets/{self.repo}", self.revision):
                raise error
        except HubError as explained:
            return DataError(f"{self.name}: {explained}")


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return not isinstance(error, FileNotFoundError)


@dataclass(frozen=True)
class HubSource(Source):
    """The rows of one split of a data set repository."""

    name: str
    repo: str  # OWNER/NAME
    commit: str  # its full id
    split: str
    files: tuple[str, ...]  # the split's files, as hf:// addresses at the commit
    columns: Columns  # how rows become records
    class_names: Mapping[str, list[str]]  # names behind the integers of columns, by column of the repository
    is_listed_cheaply = False

    @classmethod
    def from_target(cls, target: str) -> "HubSource":
        """Parse OWNER/NAME[@REVISION][?KEY=VALUE&...] and ask the Hub for the split's files and columns."""
        name = f"hub:{target}"
        match = _TARGET.fullmatch(target)
        if match is None:
            raise DataError(f"{name!r} is not hub:OWNER/NAME[@REVISION][?KEY=VALUE&...].")
        repo, revision = match[1], match[2]
        settings, columns = parse_query(name, match[3] or "")
        config, split = settings.get("config"), settings.get("split", "train")
        known = KNOWN_SETS.get(repo)
        if known is not None:
            columns = known[0].updated(columns)
            if known[1]:
                logger.warning("%s: %s", name, known[1])
        hub = Connection(name, repo, revision)
        commit = str(hub.ask(lambda: HfApi().dataset_info(repo, revision=revision).sha))
        find = _converted_files if revision == CONVERTED else _declared_files
        files = find(hub, config, commit)
        if split not in files:
            raise DataError(f"{name} has no split {split!r}, only {', '.join(files)}: name one by split=NAME")
        schema = hub.ask(lambda: _footer(files[split][0]).schema.to_arrow_schema())
        features = Features.from_arrow_schema(schema)
        columns = check_columns(name, columns, features)
        class_names = class_names_of(columns, features)
        source = cls(name, repo, commit, split, tuple(files[split]), columns, class_names)
        try:
            return (
                source.with_classes(Classes.parse(settings["classes"])) if "classes" in settings else source
            )
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error

    @property
    def snapshot(self) -> str:  # type: ignore[override]
        return f"commit {self.commit}"

    def parts(self) -> list[Part]:
        """List row groups; rows are numbered within the split."""
        parts, first = [], 0
        for path in self.files:
            footer = self._connection.ask(functools.partial(_footer, path))
            missing = self.columns.used() - set(footer.schema.to_arrow_schema().names)
            if missing:
                raise DataError(
                    f"{self.name}: {path.rpartition('/')[2]} lacks the column {', '.join(sorted(missing))} of the "
                    "split's first file, so they cannot be read together."
                )
            parts += row_groups(path, footer, first)
            first += footer.num_rows
        return parts

    def records_of(self, part: Part, reading: Reading, with_images: bool = True) -> Iterator[dict[str, Any]]:
        """Yield the records of a row group, images as they are stored; without them, in one request."""
        return self._connection.resumed(lambda: self._records(part, with_images, reading))

    def fingerprint(self) -> str:
        """The sha256 over the commit, the split's files and how their columns are read."""
        prefix = f"hf://datasets/{self.repo}@{self.commit}/"
        paths = [path.removeprefix(prefix) for path in self.files]
        content: list[Any] = [self.repo, self.commit, self.split, paths]
        content += [dict(self.columns.names), dict(self.columns.constants), self.columns.classes]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def dataset(self) -> Dataset:
        return cached_dataset(self)

    @property
    def _connection(self) -> Connection:
        return Connection(self.name, self.repo, self.commit)

    def _records(self, part: Part, with_images: bool, reading: Reading) -> Iterator[dict[str, Any]]:
        path, group, first = part
        # `pre_buffer` joins the small columns to one request, but would load all images of the group at once.
        options = {"buffer_size": READ_SIZE if with_images else 0, "pre_buffer": not with_images}
        with (
            _open(path, READ_AHEAD if with_images else 0) as remote,
            pyarrow.parquet.ParquetFile(remote, metadata=_footer(path), **options) as file,
        ):
            rows = read_group(file, group, self.columns.names["image"], with_images)
            for number, row in enumerate(rows, start=first):
                where = f"{self.repo}, split {self.split}, row {number}"
                named = self.columns.rename(named_classes(row, self.class_names, where))
                record = normalise(named, where, reading=reading)
                isic_id = record["isic_id"] or f"{self.repo.partition('/')[2]}-{self.split}-{number:06d}"
                image = record["image"]
                content = image.get("bytes") if isinstance(image, Mapping) else image  # its path is remote
                yield {**record, "isic_id": isic_id, "image": content}


def _declared_files(hub: Connection, config: str | None, commit: str) -> dict[str, list[str]]:
    """The addresses of the parquet files of each split, as `datasets` finds them."""

    def find() -> datasets.DatasetBuilder | str:
        try:
            return datasets.load_dataset_builder(hub.repo, config, revision=commit)
        except FileNotFoundDatasetsError as error:
            return (
                f"{error} Expected a repository that you may read with parquet files, images or tars in it."
            )
        except ValueError as error:  # an unknown configuration, or none named of several
            return f"{error} Name a configuration by config=NAME."

    builder = hub.ask(find)
    if isinstance(builder, str):
        raise DataError(f"{hub.name}: {builder}")
    if not isinstance(builder, Parquet):
        raise DataError(
            f"{hub.name} does not hold parquet files. Read the copy that the Hub keeps of most: "
            f"hub:{hub.repo}@{CONVERTED}; or download it and read folder:DIR or webdataset:PATTERN."
        )
    return {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}


def _converted_files(hub: Connection, config: str | None, commit: str) -> dict[str, list[str]]:
    """The addresses of the parquet files of each split in the Hub's own copy."""
    paths = hub.ask(lambda: HfApi().list_repo_files(hub.repo, revision=commit, repo_type="dataset"))
    steps = [path.split("/") for path in paths if path.endswith(".parquet") and path.count("/") == 2]
    configs = sorted({step[0] for step in steps})
    chosen = config or (configs[0] if len(configs) == 1 else "default")
    if chosen not in configs:
        raise DataError(f"{hub.name} has the configurations {', '.join(configs)}. Name one by config=NAME.")
    files: dict[str, list[str]] = {}
    for folder, split, file in sorted(step for step in steps if step[0] == chosen):
        if split.startswith("partial-"):
            logger.warning(
                "%s: the Hub has converted only a part of %s", hub.name, split.removeprefix("partial-")
            )
        address = f"hf://datasets/{hub.repo}@{commit}/{folder}/{split}/{file}"
        files.setdefault(split.removeprefix("partial-"), []).append(address)
    return files


@functools.lru_cache(maxsize=256)  # an address names a commit, so its file never changes
def _footer(path: str) -> pyarrow.parquet.FileMetaData:
    with _open(path) as file:
        return pyarrow.parquet.read_metadata(file)


def _open(path: str, read_ahead: int = 0) -> Any:
    """A file of the Hub in which each read is one range request, of `read_ahead` bytes more."""
    cache = {"cache_type": "readahead", "block_size": read_ahead} if read_ahead else {"cache_type": "none"}
    return HfFileSystem().open(path, "rb", **cache)
