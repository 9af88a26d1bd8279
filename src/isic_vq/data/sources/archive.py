"""The ISIC archive, streamed: metadata from a snapshot or the API, images from its open bucket.

    isic-archive:                                          all of it, as 256-pixel thumbnails
    isic-archive:license=CC-0&image_type=dermoscopic       what all filters let pass
    isic-archive:collection=212,66&images=full&limit=500   collections, full images, the first 500

Filters are `license`, `image_type`, `diagnosis` (one of this package's classes), `collection` (ids) and `query` (the
archive's own language); commas separate values. With `collection` or `query` the metadata come from the API v2, page by
page up to the limit, else from the bucket's snapshot, whose time is recorded. Images that the archive marks as synthetic
are left out. Every process asks once, on first use; several processes that read one source should use the snapshot,
because the API's answers to them may differ.
Source: https://api.isic-archive.com/api/docs/swagger/ and the bucket `isic-archive` of AWS Open Data.
Thumbnails are JPEG of quality 75: they bound the detail that a model can learn.
"""

import functools
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit

import pyarrow
import pyarrow.parquet

from isic_vq.data.classes import Reading
from isic_vq.data.http import RangeFile, RemoteError, RemoteSettings, Request, client
from isic_vq.data.licenses import license_id
from isic_vq.data.schema import DIAGNOSIS_LEVELS, SITE_LEVELS, DataError, normalise
from isic_vq.data.sources.base import Source, ranges
from isic_vq.data.sources.image_files import flatten
from isic_vq.models.diagnosis import archive_diagnosis, canonical_diagnosis

logger = logging.getLogger(__name__)

IMAGES_PER_PART = 64
ROWS_AT_ONCE = 10_000
READ_SIZE = 4 << 20  # bytes of one request for the snapshot
PAGE_SIZE = 100  # the API's maximum
LICENSES = {license_id(name): name for name in ("CC-0", "CC-BY", "CC-BY-NC")}
IMAGE_PATHS = {"thumbnail": "thumbnails/{}_thumbnail.jpg", "full": "images/{}.jpg"}
SNAPSHOT = "snapshots/ISIC_metadata.parquet"
ID_COLUMNS = ("isic_id", "lesion_id", "patient_id")
# Columns of few different values, held as dictionaries: the whole archive's metadata stay in memory.
REPEATED_COLUMNS = (
    *("sex", "copyright_license", "attribution", "image_type", "image_manipulation", "anatom_site_general"),
    *(*DIAGNOSIS_LEVELS, *SITE_LEVELS),
)
_TEXT, _REPEATED = pyarrow.string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
_AGE, _IDS = {"age_approx": pyarrow.float64()}, dict.fromkeys(ID_COLUMNS, _TEXT)
SCHEMA = pyarrow.schema({**_AGE, **_IDS, **dict.fromkeys(REPEATED_COLUMNS, _TEXT)})
KEPT_SCHEMA = pyarrow.schema({**_AGE, **_IDS, **dict.fromkeys(REPEATED_COLUMNS, _REPEATED)})
_ISIC_ID = re.compile(r"ISIC_\d{7}")


@dataclass(frozen=True)
class ArchiveFilters:
    """Selects images of the archive; an empty tuple selects all."""

    license: tuple[str, ...] = ()  # values of `LICENSES`
    # As the archive writes them, such as "dermoscopic" or "clinical: close-up"
    image_type: tuple[str, ...] = ()
    diagnosis: tuple[str, ...] = ()  # of `DIAGNOSES`
    collection: tuple[str, ...] = ()  # numbers of collections
    query: str = ""  # in the archive's language
    images: str = "thumbnail"  # "thumbnail" (at most 256 pixels) or "full"
    limit: int | None = None  # maximum number of images, in the order of the archive; None takes all

    @classmethod
    def parse(cls, text: str) -> "ArchiveFilters":
        """Parse KEY=VALUE[,VALUE...]&...; an unknown key or value is a DataError."""
        try:
            pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text))
        except ValueError as error:
            raise DataError(f"'isic-archive:{text}' is not KEY=VALUE&KEY=VALUE: {error}") from error
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in ("license", "image_type", "diagnosis", "collection"):
                values[key] = *values.get(key, ()), *(item.strip() for item in value.split(","))
            elif key in ("query", "images", "limit"):
                values[key] = value
            else:
                expected = ", ".join(field.name for field in fields(cls))
                raise DataError(f"isic-archive has no filter {key!r}. Expected {expected}.")
        try:
            values["diagnosis"] = tuple(map(canonical_diagnosis, values.get("diagnosis", ())))
        except ValueError as error:
            raise DataError(f"diagnosis: {error}") from None
        values["license"] = tuple(map(_license, values.get("license", ())))
        for number in values.get("collection", ()):
            if not number.isdecimal():
                raise DataError(f"collection={number}: expected numbers, such as 212 for HAM10000.")
        if (images := values.get("images", cls.images)) not in IMAGE_PATHS:
            raise DataError(f"images={images}: expected {' or '.join(IMAGE_PATHS)}.")
        if (limit := values.get("limit")) is not None:
            if not limit.isdecimal() or int(limit) == 0:
                raise DataError(f"limit={limit}: expected a positive number.")
            values["limit"] = int(limit)
        return cls(**values)

    def __str__(self) -> str:
        changed = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}
        joined = {k: ",".join(v) if isinstance(v, tuple) else v for k, v in sorted(changed.items())}
        return urlencode(joined, safe=',:" ')

    def match(self, row: dict[str, Any]) -> bool:
        """Whether a row of the archive's metadata has the licence, image type and diagnosis."""
        return (
            (not self.license or row.get("copyright_license") in self.license)
            and (not self.image_type or row.get("image_type") in self.image_type)
            and (
                not self.diagnosis
                or archive_diagnosis(list(map(row.get, DIAGNOSIS_LEVELS))) in self.diagnosis
            )
        )


def _license(name: str) -> str:
    try:
        return LICENSES[license_id(name)]
    except (ValueError, KeyError):
        expected = ", ".join(LICENSES.values())
        raise DataError(f"license={name}: the archive's licences are {expected}.") from None


@dataclass(frozen=True)
class ArchiveSource(Source):
    """Images of the ISIC archive that pass the filters."""

    filters: ArchiveFilters
    is_listed_cheaply = False

    @classmethod
    def from_target(cls, target: str) -> "ArchiveSource":
        return cls(ArchiveFilters.parse(target.strip()))

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"isic-archive:{self.filters}"

    @property
    def snapshot(self) -> str | None:  # type: ignore[override]
        """The time of the archive's snapshot; None for the API's results."""
        return self._listing()[1]

    def parts(self) -> list[range]:
        return ranges(self._listing()[0].num_rows, IMAGES_PER_PART)

    def records_of(self, part: range, reading: Reading, with_images: bool = True) -> Iterator[dict[str, Any]]:
        """Yield the records of a range of images; one that cannot be fetched has no image, and a warning names it."""
        rows = self._listing()[0].slice(part.start, len(part)).cast(SCHEMA).to_pylist()
        base, path = RemoteSettings.from_environment().bucket_url, IMAGE_PATHS[self.filters.images]
        requests = [Request(f"{base}/{path.format(row['isic_id'])}") for row in rows]
        contents = client().fetch(requests) if with_images else [None] * len(rows)
        for row, content in zip(rows, contents, strict=True):
            if isinstance(content, RemoteError):
                logger.warning("%s has no image: %s", row["isic_id"], content)
            record = normalise({**row, "source": "isic-archive"}, "isic-archive", reading=reading)
            yield {"image": content if isinstance(content, bytes) else None, **record}

    def fingerprint(self) -> str:
        """The sha256 over the snapshot's time, the kind of images and their ids."""
        table, snapshot = self._listing()
        ids = "\n".join(sorted(table["isic_id"].to_pylist()))
        return hashlib.sha256(f"{snapshot}\n{self.filters.images}\n{ids}".encode()).hexdigest()

    def _listing(self) -> tuple[pyarrow.Table, str | None]:
        return _list_images(self.filters, RemoteSettings.from_environment())


@functools.lru_cache(maxsize=2)
def _list_images(filters: ArchiveFilters, settings: RemoteSettings) -> tuple[pyarrow.Table, str | None]:
    """The metadata of the images that pass, about 0.1 KB each in memory, and the time of their snapshot."""
    kept, ids, counts = [], set[str](), Counter[str]()
    snapshot = None
    if filters.collection or filters.query:
        batches = _search(filters, settings)
    else:
        file = _open_snapshot(settings)
        written = (file.schema_arrow.metadata or {}).get(b"snapshot_timestamp")
        snapshot = written.decode() if written else None
        batches = _read_snapshot(file)
    for batch in batches:
        passes = []
        for row in batch.to_pylist():
            name = row["isic_id"]
            if not isinstance(name, str) or not _ISIC_ID.fullmatch(name):
                raise DataError(f"the archive names an image {name!r}: expected ISIC_ and seven digits")
            is_synthetic = row["image_manipulation"] == "synthetic"
            passes.append(name not in ids and not is_synthetic and filters.match(row))
            counts["twice"] += name in ids  # images may move to the next page between two requests
            counts["synthetic"] += is_synthetic
            counts["kept"] += passes[-1]
            ids.add(name)
        kept.append(batch.filter(pyarrow.array(passes, pyarrow.bool_())).cast(KEPT_SCHEMA))
        if filters.limit is not None and counts["kept"] >= filters.limit:
            break
    if counts["twice"]:
        logger.warning("the archive listed %d images twice; each is read once", counts["twice"])
    if not counts["kept"]:
        raise DataError(f"isic-archive:{filters} lets no image of {len(ids)} pass: loosen the filters.")
    logger.info(
        "isic-archive: %d of %d images pass; %d are left out as synthetic",
        *(counts["kept"], len(ids), counts["synthetic"]),
    )
    table = pyarrow.Table.from_batches(kept, KEPT_SCHEMA).slice(0, filters.limit)
    return table.unify_dictionaries().combine_chunks(), snapshot


def _open_snapshot(settings: RemoteSettings) -> pyarrow.parquet.ParquetFile:
    url = f"{settings.bucket_url}/{SNAPSHOT}"
    try:
        file = pyarrow.parquet.ParquetFile(RangeFile(url), buffer_size=READ_SIZE, pre_buffer=False)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{url} is not a parquet file: {error}") from error
    missing = {"isic_id", "copyright_license", "attribution", "image_manipulation"} - set(
        file.schema_arrow.names
    )
    if missing:
        raise DataError(
            f"{url} has no column {', '.join(sorted(missing))}: its layout has changed, which a newer isic-vq may read"
        )
    return file


def _read_snapshot(file: pyarrow.parquet.ParquetFile) -> Iterator[pyarrow.RecordBatch]:
    present = [name for name in SCHEMA.names if name in file.schema_arrow.names]
    for batch in file.iter_batches(ROWS_AT_ONCE, columns=present):
        columns = [
            batch[field.name].cast(field.type)
            if field.name in present
            else pyarrow.nulls(len(batch), field.type)
            for field in SCHEMA
        ]
        yield pyarrow.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _search(filters: ArchiveFilters, settings: RemoteSettings) -> Iterator[pyarrow.RecordBatch]:
    url, http = f"{settings.api_url}/images/search/", client()
    params = {"limit": str(PAGE_SIZE)}
    if filters.collection:
        params["collections"] = ",".join(filters.collection)
    if filters.query:
        params["query"] = filters.query
    page, listed, expected = http.get_json(url, params), set(), None
    while True:
        if not isinstance(page, dict) or not isinstance(page.get("results"), list):
            raise DataError(
                f"{url} did not answer with a page of results: its API has changed, which a newer isic-vq may read"
            )
        expected = page.get("count") if expected is None else expected
        rows = [flatten(values) for values in page["results"]]
        listed |= {row.get("isic_id") for row in rows}
        yield pyarrow.RecordBatch.from_pylist(
            [{name: row.get(name) for name in SCHEMA.names} for row in rows], SCHEMA
        )
        if not page.get("next"):
            break
        # Only the query of the next page's address counts, so that a mirror is never left.
        page = http.get_json(urljoin(url, f"?{urlsplit(page['next']).query}"))
    if expected is not None and len(listed) != expected:
        logger.warning(
            "the archive counted %d images and listed %d: it changed meanwhile", expected, len(listed)
        )
