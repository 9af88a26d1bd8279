"""Data sets on the Hugging Face Hub: any repository with a column of images, at one commit.

    hub:OWNER/NAME[@REVISION][?KEY=VALUE&...]

    split=NAME, config=NAME      which rows; by default the split train of the only configuration
    image=COLUMN, dx and so on   which column holds `image` or another column of `FEATURES`, where its name does
                                 not tell (`COLUMN_ALIASES`)
    classes=MEL,NV,...           the classes, in the order of the integers that a column of them may hold
    set.license=TEXT, ...        the same value in every row; {COLUMN} in it stands for that column's

Which files make up a split is found as `datasets` does it; no code of a repository is run. The files are parquet,
read row group by row group over range requests: one large file is still divided among processes, and metadata are
read without the images beside them. Of repositories in other formats (loose images, tars, CSV), the Hub keeps a
parquet copy under the revision refs/convert/parquet, which is read by its own layout: CONFIG/SPLIT/0000.parquet.
Differs from `load_dataset`: a connection that breaks in the middle of a part costs that part's beginning once
more, not the run.
"""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets import Dataset, Features
from datasets.exceptions import FileNotFoundDatasetsError
from datasets.packaged_modules.parquet.parquet import Parquet
from huggingface_hub import HfApi, HfFileSystem

from isic_vq.data.classes import Classes, Reading
from isic_vq.data.schema import DataError, normalise
from isic_vq.data.sources.base import Source
from isic_vq.data.sources.cached import cached_dataset
from isic_vq.data.sources.hub_columns import KNOWN_SETS, Columns, check_columns, class_names_of, parse_query
from isic_vq.data.sources.hub_connection import Connection

logger = logging.getLogger(__name__)

# A file, the number of a row group in it, and that of the group's first row in the split.
Part = tuple[str, int, int]

READ_SIZE = 8 << 20  # bytes of one range request for images, at most
READ_AHEAD = 64 << 10  # bytes read beyond, where the other columns of a row group most often are
CONVERTED = "refs/convert/parquet"
_TARGET = re.compile(r"([\w.-]+/[\w.-]+)(?:@([^?]+))?(?:\?(.*))?", re.DOTALL)


@dataclass(frozen=True)
class HubSource(Source):
    """The rows of one split of a data set repository.

    Attributes:
        name: as `Source` has it.
        repo: OWNER/NAME.
        commit: its full id.
        split: the split.
        files: the split's files, as hf:// addresses at the commit.
        columns: how rows become records.
        class_names: names behind the integers of columns, by column of the repository.
    """

    name: str
    repo: str
    commit: str
    split: str
    files: tuple[str, ...]
    columns: Columns
    class_names: Mapping[str, list[str]]

    @classmethod
    def from_target(cls, target: str) -> "HubSource":
        """Parse OWNER/NAME[@REVISION][?KEY=VALUE&...] and ask the Hub what it names.

        Raises:
            DataError: the text is something else, or the Hub has no such images to give; the message tells the
                way out.
        """
        name = f"hub:{target}"
        match = _TARGET.fullmatch(target)
        if match is None:
            raise DataError(
                f"{name!r} is not hub:OWNER/NAME[@REVISION][?KEY=VALUE&...], such as "
                "hub:flwrlabs/fed-isic2019?split=test."
            )
        repo, revision = match[1], match[2]
        settings, columns = parse_query(name, match[3] or "")
        config, split = settings.get("config"), settings.get("split", "train")
        known = KNOWN_SETS.get(repo)
        if known is not None:
            columns = known.columns.updated(columns)
            if known.warning:
                logger.warning("%s: %s", name, known.warning)
        hub = Connection(name, repo, revision)
        commit = str(hub.ask(lambda: HfApi().dataset_info(repo, revision=revision).sha))
        find = _converted_files if revision == CONVERTED else _declared_files
        files = find(hub, config, commit)
        if split not in files:
            raise DataError(
                f"{name} has no split {split!r}, only {', '.join(files)}. Name one by split=NAME."
            )
        schema = hub.ask(lambda: _footer(files[split][0]).schema.to_arrow_schema())
        features = Features.from_arrow_schema(schema)
        columns = check_columns(name, columns, features)
        class_names = class_names_of(columns, features)
        source = cls(
            name=name,
            repo=repo,
            commit=commit,
            split=split,
            files=tuple(files[split]),
            columns=columns,
            class_names=class_names,
        )
        try:
            return (
                source.with_classes(Classes.parse(settings["classes"])) if "classes" in settings else source
            )
        except ValueError as error:
            raise DataError(f"{name}: {error}") from error

    is_listed_cheaply = False

    @property
    def snapshot(self) -> str:  # type: ignore[override]
        """The commit."""
        return f"commit {self.commit}"

    def parts(self) -> list[Part]:
        """Row groups."""
        found, first = [], 0
        for path in self.files:
            footer = self._connection.ask(functools.partial(_footer, path))
            missing = self.columns.used() - set(footer.schema.to_arrow_schema().names)
            if missing:
                raise DataError(
                    f"{self.name}: {path.rpartition('/')[2]} lacks the column {', '.join(sorted(missing))} of the "
                    "split's first file, so they cannot be read together."
                )
            for group in range(footer.num_row_groups):
                found.append((path, group, first))
                first += footer.row_group(group).num_rows
        return found

    def records_of(self, part: Part, reading: Reading) -> Iterator[dict[str, Any]]:
        """Yield the records of a row group, images as they are stored; a broken connection is taken up where it broke."""
        return self._connection.resumed(lambda: self._records(part, True, reading))

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        """The rows of all records; one request per row group, for the columns beside the images alone."""
        for part in self.parts():
            read = functools.partial(self._records, part, False, reading)
            for record in self._connection.resumed(read):
                yield {name: value for name, value in record.items() if name != "image"}

    def fingerprint(self) -> str:
        """Of the commit, the split's files and how their columns are read."""
        prefix = f"hf://datasets/{self.repo}@{self.commit}/"
        paths = [path.removeprefix(prefix) for path in self.files]
        content: list[Any] = [self.repo, self.commit, self.split, paths]
        content += [dict(self.columns.names), dict(self.columns.constants), self.columns.classes]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def dataset(self) -> Dataset:
        """All records, downloaded once into the cache of `datasets`."""
        return cached_dataset(self)

    @property
    def _connection(self) -> Connection:
        return Connection(self.name, self.repo, self.commit)

    def _records(self, part: Part, with_images: bool, reading: Reading) -> Iterator[dict[str, Any]]:
        """Read the records of a row group; an image without an id is named by its place in the split."""
        path, group, first = part
        rows = _read_group(path, group, self.columns.names["image"], with_images)
        for number, row in enumerate(rows, start=first):
            where = f"{self.repo}, split {self.split}, row {number}"
            record = normalise(self._named(row, where), where, reading=reading)
            place = f"{self.repo.partition('/')[2]}-{self.split}-{number:06d}"
            image = record["image"]
            content = (
                image.get("bytes") if isinstance(image, Mapping) else image
            )  # a path is of another machine
            yield {**record, "isic_id": record["isic_id"] or place, "image": content}

    def _named(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A row with names for its class ids, under names that `normalise` knows."""
        words = dict(row)
        for column, names in self.class_names.items():
            value = row[column]
            if value is None or value == -1:  # `datasets` writes -1 for a missing class
                words[column] = None
            elif isinstance(value, int) and 0 <= value < len(names):
                words[column] = names[value]
            else:
                raise DataError(
                    f"{where}: {column} is {value!r}, expected 0 to {len(names) - 1} for {', '.join(names)}. "
                    "Name the classes in order: classes=A,B,..."
                )
        return self.columns.rename(words)


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


@functools.lru_cache(maxsize=256)
def _footer(path: str) -> pyarrow.parquet.FileMetaData:
    """What a parquet file says about itself; its address names a commit, so it never changes."""
    with _open(path) as file:
        return pyarrow.parquet.read_metadata(file)


def _open(path: str, read_ahead: int = 0) -> Any:
    """A file of the Hub in which each read is one range request of so many bytes more."""
    cache = {"cache_type": "readahead", "block_size": read_ahead} if read_ahead else {"cache_type": "none"}
    return HfFileSystem().open(path, "rb", **cache)


def _read_group(path: str, group: int, image: str, with_images: bool) -> Iterator[dict[str, Any]]:
    """The rows of a row group; without images, only the name beside the image's bytes, if there is one."""
    footer = _footer(path)
    schema = footer.schema.to_arrow_schema()
    columns = [column for column in schema.names if column != image]
    if with_images:
        columns.insert(0, image)  # what is read ahead of it are most often the other columns
    elif pyarrow.types.is_struct(schema.field(image).type):
        columns.append(f"{image}.path")
    with (
        _open(path, READ_AHEAD if with_images else 0) as file,
        # `pre_buffer` joins the small columns to one request, but would load all images of the group at once.
        pyarrow.parquet.ParquetFile(
            file, metadata=footer, buffer_size=READ_SIZE if with_images else 0, pre_buffer=not with_images
        ) as parquet,
    ):
        for batch in parquet.iter_batches(
            batch_size=64, row_groups=[group], columns=columns, use_threads=False
        ):
            for row in batch.to_pylist():
                yield {image: None, **row}
