"""The ISIC archive, streamed: metadata from a snapshot or the API, images from its open bucket.

    isic-archive:                                          all of it, as 256-pixel thumbnails
    isic-archive:license=CC-0&image_type=dermoscopic       what all filters let pass
    isic-archive:collection=212,66&images=full&limit=500   collections, full images, the first 500

Filters are `license`, `image_type`, `diagnosis` (one of this package's classes), `collection` (ids) and `query` (the
archive's own language); values are separated by commas. Without `collection` and `query` the metadata come from the
bucket's snapshot, whose time is recorded, else from the API v2, page by page, as far as the limit asks. Images that the
archive marks as synthetic are never read. Each process asks once, when it first needs to know: where several read one
source together, take the snapshot, because the API's answers to them may differ.
Source: https://api.isic-archive.com/api/docs/swagger/ and the bucket `isic-archive` of AWS Open Data.
Thumbnails are JPEG of quality 75: they bound the detail that a model can learn.
"""

import functools
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit

import pyarrow
import pyarrow.parquet

from isic_vq.data.classes import Reading
from isic_vq.data.http import RangeFile, RemoteError, RemoteSettings, Request, client
from isic_vq.data.schema import DataError, normalise
from isic_vq.data.sources.base import Source
from isic_vq.data.sources.sidecar import flatten
from isic_vq.models.diagnosis import archive_diagnosis, canonical_diagnosis

logger = logging.getLogger(__name__)

IMAGES_PER_PART = 64
ROWS_AT_ONCE = 10_000
READ_SIZE = 4 << 20  # bytes of the snapshot that are asked for at once
PAGE_SIZE = 100  # the API gives no more
LICENSES = ("CC-0", "CC-BY", "CC-BY-NC")
IMAGE_PATHS = {"thumbnail": "thumbnails/{}_thumbnail.jpg", "full": "images/{}.jpg"}
SNAPSHOT = "snapshots/ISIC_metadata.parquet"
DIAGNOSIS_LEVELS = tuple(f"diagnosis_{level}" for level in range(1, 6))
SITE_LEVELS = (
    "anatom_site_special",
    "anatom_site_general",
    *(f"anatom_site_{level}" for level in range(5, 0, -1)),
)
ID_COLUMNS = ("isic_id", "lesion_id", "patient_id")
# The same few words in most rows: each is held once.
REPEATED_COLUMNS = (
    "sex",
    "copyright_license",
    "attribution",
    "image_type",
    "image_manipulation",
    *DIAGNOSIS_LEVELS,
    *SITE_LEVELS,
)
SCHEMA = pyarrow.schema(
    {
        "age_approx": pyarrow.float64(),
        **dict.fromkeys((*ID_COLUMNS, *REPEATED_COLUMNS), pyarrow.string()),
    }
)
KEPT_SCHEMA = pyarrow.schema(
    [
        field.with_type(pyarrow.dictionary(pyarrow.int32(), field.type))
        if field.name in REPEATED_COLUMNS
        else field
        for field in SCHEMA
    ]
)
_ISIC_ID = re.compile(r"ISIC_\d{7}")


@dataclass(frozen=True)
class ArchiveFilters:
    """Which images; an empty tuple lets all pass.

    Attributes:
        license: of `LICENSES`.
        image_type: as the archive writes them, such as "dermoscopic" or "clinical: close-up".
        diagnosis: of `DIAGNOSES`.
        collection: numbers of collections.
        query: in the archive's language.
        images: "thumbnail" (at most 256 pixels) or "full".
        limit: at most so many, in the order of the archive; None takes all.
    """

    license: tuple[str, ...] = ()
    image_type: tuple[str, ...] = ()
    diagnosis: tuple[str, ...] = ()
    collection: tuple[str, ...] = ()
    query: str = ""
    images: str = "thumbnail"
    limit: int | None = None

    @classmethod
    def parse(cls, text: str) -> "ArchiveFilters":
        """Read KEY=VALUE[,VALUE...]&...

        Raises:
            DataError: a key or value that does not exist.
        """
        values: dict[str, Any] = {}
        try:
            pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text))
        except ValueError as error:
            raise DataError(f"'isic-archive:{text}' is not KEY=VALUE&KEY=VALUE: {error}") from error
        for key, value in pairs:
            if key in ("license", "image_type", "diagnosis", "collection"):
                values[key] = (*values.get(key, ()), *(item.strip() for item in value.split(",")))
            elif key in ("query", "images", "limit"):
                values[key] = value
            else:
                raise DataError(f"isic-archive has no filter {key!r}. Expected {', '.join(vars(cls()))}.")
        cls._check(values)
        return cls(**values)

    @staticmethod
    def _check(values: dict[str, Any]) -> None:
        spelled = {re.sub(r"[\W_]", "", name.lower()): name for name in LICENSES}
        licenses = [
            spelled.get(re.sub(r"[\W_]", "", name.lower()), name) for name in values.get("license", ())
        ]
        for name in licenses:
            if name not in LICENSES:
                raise DataError(f"license={name}: the archive's licences are {', '.join(LICENSES)}.")
        try:
            diagnoses = [canonical_diagnosis(name) for name in values.get("diagnosis", ())]
        except ValueError as error:
            raise DataError(f"diagnosis: {error}") from None
        for number in values.get("collection", ()):
            if not number.isdecimal():
                raise DataError(
                    f"collection={number}: expected numbers of collections, such as 212 for HAM10000."
                )
        if values.get("images", "full") not in IMAGE_PATHS:
            raise DataError(f"images={values['images']}: expected {' or '.join(IMAGE_PATHS)}.")
        if "limit" in values:
            if not values["limit"].isdecimal() or int(values["limit"]) == 0:
                raise DataError(f"limit={values['limit']}: expected a positive number.")
            values["limit"] = int(values["limit"])
        values |= {"license": tuple(licenses), "diagnosis": tuple(diagnoses)}

    def __str__(self) -> str:
        defaults = vars(ArchiveFilters())
        changed = {k: v for k, v in vars(self).items() if v != defaults[k]}
        joined = {k: ",".join(v) if isinstance(v, tuple) else v for k, v in sorted(changed.items())}
        return urlencode(joined, safe=',:" ')

    def let_pass(self, row: dict[str, Any]) -> bool:
        """Whether an image of the archive's metadata is wanted."""
        return (
            (not self.license or row.get("copyright_license") in self.license)
            and (not self.image_type or row.get("image_type") in self.image_type)
            and (not self.diagnosis or _diagnosis(row) in self.diagnosis)
        )


@dataclass(frozen=True)
class ArchiveSource(Source):
    """Images of the ISIC archive.

    Attributes:
        filters: which.
    """

    filters: ArchiveFilters

    @classmethod
    def from_target(cls, target: str) -> "ArchiveSource":
        """Parse the filters.

        Raises:
            DataError: as `ArchiveFilters.parse`.
        """
        return cls(ArchiveFilters.parse(target.strip()))

    is_listed_cheaply = False

    @property
    def name(self) -> str:  # type: ignore[override]
        """The URI with its filters in order."""
        return f"isic-archive:{self.filters}"

    @property
    def snapshot(self) -> str | None:  # type: ignore[override]
        """The time of the archive's snapshot; None for what the API found."""
        return self._found()[1]

    def parts(self) -> list[tuple[int, int]]:
        """Ranges of images, by number."""
        number = self._found()[0].num_rows
        return [(start, min(start + IMAGES_PER_PART, number)) for start in range(0, number, IMAGES_PER_PART)]

    def records_of(self, part: tuple[int, int], reading: Reading) -> Iterator[dict[str, Any]]:
        """Yield the records of a range of images; one that cannot be had has no image, and a warning names it."""
        start, stop = part
        rows = self._found()[0].slice(start, stop - start).cast(SCHEMA).to_pylist()
        base, path = RemoteSettings.from_environment().bucket_url, IMAGE_PATHS[self.filters.images]
        requests = (Request(f"{base}/{path.format(row['isic_id'])}") for row in rows)
        for row, content in zip(rows, client().fetch(requests), strict=True):
            if isinstance(content, RemoteError):
                logger.warning("%s has no image: %s", row["isic_id"], content)
            yield {"image": content if isinstance(content, bytes) else None, **_normal(row, reading)}

    def rows(self, reading: Reading) -> Iterator[dict[str, Any]]:
        """The rows of all images."""
        for batch in self._found()[0].to_batches(ROWS_AT_ONCE):
            for row in batch.cast(SCHEMA).to_pylist():
                yield _normal(row, reading)

    def fingerprint(self) -> str:
        """Of the snapshot's time, the kind of images and their ids."""
        table, snapshot = self._found()
        ids = "\n".join(sorted(table["isic_id"].to_pylist()))
        return hashlib.sha256(f"{snapshot}\n{self.filters.images}\n{ids}".encode()).hexdigest()

    def _found(self) -> tuple[pyarrow.Table, str | None]:
        return _find(self.filters, RemoteSettings.from_environment())


@functools.lru_cache(maxsize=2)
def _find(filters: ArchiveFilters, settings: RemoteSettings) -> tuple[pyarrow.Table, str | None]:
    """The archive's metadata of the images that pass, and the time of their snapshot.

    A table of `KEPT_SCHEMA`, because a process holds it while it reads: of the whole archive, about 0.1 KB per image.

    Raises:
        DataError: nothing passes, or the metadata are not what they are known to be.
    """
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
                raise DataError(
                    f"the archive's metadata name an image {name!r}: expected ISIC_ and seven digits"
                )
            is_synthetic = row["image_manipulation"] == "synthetic"
            passes.append(name not in ids and not is_synthetic and filters.let_pass(row))
            counts["twice"] += name in ids  # the set changed between two pages
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
        "isic-archive: %d of %d images pass; %d, marked as synthetic, never do",
        *(counts["kept"], len(ids), counts["synthetic"]),
    )
    table = pyarrow.Table.from_batches(kept, KEPT_SCHEMA).slice(0, filters.limit)
    return table.unify_dictionaries().combine_chunks(), snapshot


def _open_snapshot(settings: RemoteSettings) -> pyarrow.parquet.ParquetFile:
    """The bucket's metadata of all images."""
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
            f"{url} has no column {', '.join(sorted(missing))}: its layout is not the one that is known here"
        )
    return file


def _read_snapshot(file: pyarrow.parquet.ParquetFile) -> Iterator[pyarrow.RecordBatch]:
    """Its rows, a few thousand at a time."""
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
    """What the API finds, page by page."""
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
                f"{url} did not answer with a page of results: its API is not the one that is known here"
            )
        expected = page.get("count") if expected is None else expected
        rows = [flatten(about) for about in page["results"]]
        listed |= {row.get("isic_id") for row in rows}
        yield pyarrow.RecordBatch.from_pylist(
            [{name: row.get(name) for name in SCHEMA.names} for row in rows], SCHEMA
        )
        if not page.get("next"):
            break
        page = http.get_json(_same_server(url, page["next"]))
    if expected is not None and len(listed) != expected:
        logger.warning(
            "the archive counted %d images and listed %d: it changed meanwhile", expected, len(listed)
        )


def _same_server(url: str, following: str) -> str:
    """The address of the next page: its query alone counts, so that a mirror is never left."""
    query = urlsplit(following).query
    return urljoin(url, f"?{query}")


def _diagnosis(row: dict[str, Any]) -> str:
    return archive_diagnosis([row.get(name) for name in DIAGNOSIS_LEVELS])


def _normal(row: dict[str, Any], reading: Reading) -> dict[str, Any]:
    return normalise({**row, "source": "isic-archive"}, "isic-archive", reading=reading)
