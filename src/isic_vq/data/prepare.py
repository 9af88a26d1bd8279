"""Prepare images for training: from any sources to shards at the training size, with splits and a manifest.

Images are read and resized in units, one part of one source each, the pieces of a `Work`, by any number of processes. The
rest needs all units and is quick: near-duplicates, splits, shards. The bytes of the result depend only on the sources and
settings.
"""

import hashlib
import io
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image

from isic_vq import __version__
from isic_vq.data.classes import Classes, ordered_classes
from isic_vq.data.duplicates import (
    DuplicatePair,
    drop_from_train,
    duplicate_report,
    find_duplicates,
    signature,
)
from isic_vq.data.licenses import license_id
from isic_vq.data.loading import check_share
from isic_vq.data.schema import FEATURES, DataError, without_image
from isic_vq.data.shards import SUFFIXES, parquet_bytes
from isic_vq.data.sources import Source, find_source
from isic_vq.data.sources.base import count_rows
from isic_vq.data.sources.image_files import file_digest
from isic_vq.data.sources.manifest import (
    IMAGE_COLUMNS,
    MANIFEST,
    Manifest,
    Shard,
    read_images,
    write_images,
    write_shard,
)
from isic_vq.data.splits import SPLITS, Assignment, assign_splits, few_images, stratified_report
from isic_vq.files import write_atomically
from isic_vq.locks import HOST, hold, is_running
from isic_vq.models.checks import expect
from isic_vq.models.image_processing_isic_vq import ImageError, IsicVQImageProcessor
from isic_vq.work import SETTINGS, Work, differences, differences_text

logger = logging.getLogger(__name__)

WORK = ".work"
FIXED = ("size", "encoding", "quality", "format")  # settings that extending a folder cannot change
UNREADABLE = "unreadable: "  # prefix of the reason of an image that could not be read
_UNIT = pyarrow.schema([*IMAGE_COLUMNS, ("image", pyarrow.binary())])


@dataclass(frozen=True)
class Preparation:
    """Settings of `prepare`; a ValueError names one that is out of its range.

    Attributes:
        size: side in pixels.
        encoding: "jpeg" (without chroma subsampling) or "png" (lossless, about three times as large).
        quality: of JPEG.
        format: "parquet" or "webdataset".
        rows_per_shard: images in a file.
        shares: expected share of the groups in "validation" and "test", for sources without a split.
        seed: of the splits.
        licenses: take only images under one of these; without any, take all.
        keep_duplicates: keep training images that are also in validation or test.
        max_corrupt_share: a larger share of unreadable images is an error.
    """

    size: int = 128
    encoding: str = "jpeg"
    quality: int = 95
    format: str = "parquet"
    rows_per_shard: int = 1024
    shares: Mapping[str, float] = field(default_factory=lambda: {"validation": 0.1, "test": 0.0})
    seed: int = 0
    licenses: tuple[str, ...] = ()
    keep_duplicates: bool = False
    max_corrupt_share: float = 0.01

    def __post_init__(self) -> None:
        expect(self.size >= 16, "size", self.size, "at least 16 pixels")
        expect(self.encoding in ("jpeg", "png"), "encoding", self.encoding, "jpeg or png")
        expect(1 <= self.quality <= 100, "quality", self.quality, "1 to 100")
        expect(self.format in SUFFIXES, "format", self.format, " or ".join(SUFFIXES))
        expect(self.rows_per_shard >= 1, "rows_per_shard", self.rows_per_shard, "at least 1")
        for name in self.licenses:
            license_id(name)

    def encode(self, square: Any) -> bytes:
        buffer = io.BytesIO()
        options = {"quality": self.quality, "subsampling": 0} if self.encoding == "jpeg" else {}
        Image.fromarray(square).save(buffer, format=self.encoding, **options)
        return buffer.getvalue()


def prepare(
    output: Path,
    sources: Sequence[tuple[str | None, str]],
    preparation: Preparation,
    workers: int = 1,
    extend: bool = False,
    progress: bool = False,
    classes: Classes | None = None,
) -> Manifest:
    """Prepare the images of sources in a folder.

    Args:
        output: the folder; the same call resumes an interrupted one.
        sources: split (None: by `preparation.shares`) and URI of each.
        preparation: the settings.
        workers: number of processes.
        extend: add to a finished folder: its images keep their splits and bytes, and new images that would put a lesion,
            a patient or a photograph into two splits are excluded.
        progress: show a progress bar.
        classes: names that labels may have, as for `find_source`.

    Returns:
        The folder's manifest.

    Raises:
        ValueError: there are no sources, or an unknown split.
        DataError: a source cannot be used, too many images are unreadable, or the folder holds something else.
        InUseError: another process prepares the same folder.
        OSError: a file, which is named, cannot be written.
    """
    with hold(output):
        opened = [(split, find_source(uri, classes)) for split, uri in sources]
        if not opened:
            raise ValueError("nothing to prepare: name at least one source")
        units = {
            f"{i:02d}-{j:06d}.parquet": (source, part)
            for i, (_, source) in enumerate(opened)
            for j, part in enumerate(source.parts())
        }
        infos = [asdict(source.describe()) for _, source in opened]
        settings = _settings(preparation, opened, infos)
        old, work = _open_folder(output, settings, extend), Work(output / WORK, list(units), "parts")
        if old is not None and old.settings == settings:
            logger.info("%s is finished with these settings already", output.name)
            if (
                not (begun := work.folder / SETTINGS).is_file()
                or json.loads(begun.read_text(encoding="utf-8")) == settings
            ):
                shutil.rmtree(work.folder, ignore_errors=True)  # left by a process killed at its end
            return old
        work.begin(settings)
        calls = [(*unit, work.folder / name, preparation) for name, unit in units.items()]
        _make_units(work, calls, workers, sum(info["num_images"] for info in infos), progress)
        return _finish(output, work, opened, infos, settings, preparation, old)


def _finish(
    output: Path,
    work: Work,
    sources: Sequence[tuple[str | None, Source]],
    infos: Sequence[dict[str, Any]],
    settings: dict[str, Any],
    preparation: Preparation,
    old: Manifest | None,
) -> Manifest:
    """Write shards and manifest from the finished units, and remove the units."""
    paths, rows, wanted = [work.folder / name for name in work.names], [], []
    for path in paths:
        unit = pyarrow.parquet.read_table(path, columns=IMAGE_COLUMNS.names).to_pylist()
        rows += unit
        wanted += [sources[int(path.name.partition("-")[0])][0]] * len(unit)  # the source's split
    bad = [
        f"{r['isic_id']}: {r['reason'].removeprefix(UNREADABLE)}" for r in rows if r["split"] == "excluded"
    ]
    if len(bad) == len(rows):
        raise DataError("no image is left to prepare: check the sources and the licences")
    check_share(bad, len(bad), len(rows), preparation.max_corrupt_share, "unreadable")
    old_rows, old_shards = (read_images(output), old.shards) if old else ([], [])
    pairs = _assign(rows, wanted, old_rows, preparation)
    shards = _write_shards(output, paths, rows, preparation, old_shards)
    everything = [*old_rows, *rows]
    kept = [row for row in everything if row["split"] != "excluded"]
    strata = stratified_report(kept, [Assignment(row["split"]) for row in kept])
    for warning in few_images(strata):
        logger.warning("%s", warning)
    manifest = Manifest(
        settings=settings,
        sources=[*(old.sources if old else []), *infos],
        splits={split: count_rows([r for r in everything if r["split"] == split]) for split in SPLITS},
        shards=shards,
        unreadable={
            str(row["isic_id"]): row["reason"].removeprefix(UNREADABLE)
            for row in everything
            if (row["reason"] or "").startswith(UNREADABLE)
        },
        strata=[asdict(stratum) for stratum in strata],
        duplicates=duplicate_report(pairs, everything),
        classes=_classes([source.classes for _, source in sources], old, everything),
    )
    write_images(output, everything)
    manifest.write(output)
    shutil.rmtree(work.folder)
    return manifest


def _classes(
    declared: Sequence[Classes], old: Manifest | None, rows: Sequence[Mapping[str, Any]]
) -> list[str] | None:
    """The classes of all images in order, first those of the folder that is extended; None if they are ISIC's."""
    before = old.classes if old is not None else None
    if before is None and all(classes.is_default for classes in declared):
        return None
    names = dict.fromkeys((*(before or ()), *(name for classes in declared for name in classes.names)))
    return ordered_classes((row["diagnosis"] for row in rows), list(names))


def _settings(
    preparation: Preparation,
    sources: Sequence[tuple[str | None, Source]],
    infos: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    named: list[dict[str, Any]] = []
    for (split, source), info in zip(sources, infos, strict=True):
        named.append({"split": split, **{key: info[key] for key in ("name", "fingerprint", "snapshot")}})
        if not source.classes.is_default:
            named[-1]["classes"] = [list(source.classes.names), source.classes.others]
    versions = {name: metadata.version(name) for name in ("pillow", "pyarrow", "ImageHash")}
    return {
        **asdict(preparation),
        "shares": dict(preparation.shares),
        "licenses": list(preparation.licenses),
        "sources": named,
        "versions": {"isic_vq": __version__, **versions},
    }


def _open_folder(output: Path, settings: Mapping[str, Any], extend: bool) -> Manifest | None:
    """The manifest of a folder that is finished with these settings or may be extended; None of an unfinished one."""
    old = Manifest.read(output) if (output / MANIFEST).is_file() else None
    if old is None:
        if extend:
            raise DataError(f"{output.name} is not finished: prepare it without --extend first")
        others = {path.name for path in output.glob("*") if path.name != WORK and path.suffix != ".lock"}
        if others and not (output / WORK / SETTINGS).is_file():
            raise DataError(f"{output.name} holds {min(others)}: choose an empty folder")
        return None
    different = differences(old.settings, settings)
    if different and not extend:
        raise DataError(
            f"{output.name} was prepared with other settings ({differences_text(different)}): choose another, or --extend it"
        )
    fixed = {key: values for key, values in different.items() if key in FIXED}
    if fixed:
        raise DataError(f"{output.name} was prepared with {differences_text(fixed)}: extend it with the same")
    return old


def _make_units(
    work: Work, calls: Sequence[tuple[Any, ...]], workers: int, num_images: int, progress: bool
) -> None:
    missing = work.missing
    finished = (work.path(number) for number in work.numbers if number not in missing)
    initial = sum(pyarrow.parquet.read_metadata(path).num_rows for path in finished)
    with work.progress(num_images, initial, "preparing", progress) as bar:
        for num_rows in _run(_make_unit, [calls[number] for number in missing], workers):
            bar.update(num_rows)


def _run(function: Callable[..., int], calls: Sequence[tuple[Any, ...]], workers: int) -> Iterator[int]:
    """Yield the results of calls as they finish, from this many processes."""
    if workers <= 1:
        yield from (function(*arguments) for arguments in calls)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),)) as pool:
        try:
            futures = [pool.submit(function, *arguments) for arguments in calls]
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end with it, even if it is killed."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while is_running(parent, HOST):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_unit(source: Source, part: Any, path: Path, preparation: Preparation) -> int:
    """Write the rows of a part, with their images at the training size; returns their number."""
    processor = IsicVQImageProcessor(size=preparation.size)
    wanted = {license_id(name) for name in preparation.licenses} - {"unknown"}
    rows = [
        _prepared_row(record, source.name, processor, preparation)
        for record in source.read(part)
        if not preparation.licenses or license_id(record["license"]) in wanted
    ]
    table = pyarrow.Table.from_pylist(rows, schema=_UNIT)
    write_atomically(path, parquet_bytes(table, compression="none"))
    return len(rows)


def _prepared_row(
    record: Mapping[str, Any], origin: str, processor: IsicVQImageProcessor, preparation: Preparation
) -> dict[str, Any]:
    """A record's row: with image and signature, or excluded with a reason."""
    row: dict[str, Any] = {**without_image(record), "origin": origin}
    content = _image_bytes(record["image"])
    if content is None:
        return {**row, "split": "excluded", "reason": f"{UNREADABLE}the record has no image"}
    row["sha256"] = hashlib.sha256(content).hexdigest()
    try:
        square = processor.to_square(content, name=str(row["isic_id"]))
        return {**row, "signature": signature(content), "image": preparation.encode(square)}
    except ImageError as error:
        return {**row, "split": "excluded", "reason": f"{UNREADABLE}{error}"}


def _image_bytes(image: Any) -> bytes | None:
    """The encoded image of a record; None if it has none or its file is missing."""
    if isinstance(image, Mapping):
        image = image["bytes"] if image["bytes"] is not None else image["path"]
    if isinstance(image, (str, Path)):
        return Path(image).read_bytes() if Path(image).is_file() else None
    return image


def _assign(
    rows: list[dict[str, Any]],
    wanted: Sequence[str | None],
    old_rows: Sequence[Mapping[str, Any]],
    preparation: Preparation,
) -> list[DuplicatePair]:
    """Set split and reason of new rows; returns the near-duplicates among old and new rows."""
    readable = [number for number, row in enumerate(rows) if row["split"] is None]
    assignments = assign_splits(
        [rows[number] for number in readable],
        preparation.shares,
        preparation.seed,
        [wanted[number] for number in readable],
        old_rows,
        [Assignment(row["split"], row["reason"]) for row in old_rows],
    )
    for number, assignment in zip(readable, assignments, strict=True):
        rows[number] |= {"split": assignment.split, "reason": assignment.reason}
    everything = [*old_rows, *rows]
    described = [number for number, row in enumerate(everything) if row["signature"] is not None]
    pairs = [
        DuplicatePair(described[p.first], described[p.second], p.view, p.distance, p.similarity)
        for p in find_duplicates([everything[number]["signature"] for number in described])
    ]
    if not preparation.keep_duplicates:
        names = [str(row["isic_id"]) for row in everything]
        reasons = drop_from_train(pairs, [row["split"] for row in everything], names, len(old_rows))
        for number, reason in reasons.items():
            rows[number - len(old_rows)].update(split="excluded", reason=reason)
    return pairs


def _write_shards(
    output: Path,
    paths: Sequence[Path],
    rows: Sequence[dict[str, Any]],
    preparation: Preparation,
    old: Sequence[Shard],
) -> list[Shard]:
    """Write the images of each split in order; at most one unit and one shard per split are in memory."""
    shards, suffix = list(old), "png" if preparation.encoding == "png" else "jpg"
    waiting: dict[str, list[tuple[dict[str, Any], bytes]]] = {split: [] for split in SPLITS[:3]}

    def flush(split: str) -> None:
        number = sum(shard.split == split for shard in shards)
        path = output / f"{split}-{number:05d}{SUFFIXES[preparation.format]}"
        records = []
        for place, (row, image) in enumerate(waiting[split]):
            stored = {"bytes": image, "path": f"{Path(str(row['isic_id'])).name}.{suffix}"}
            records.append({"image": stored, **{name: row[name] for name in without_image(FEATURES)}})
            row |= {"shard": path.name, "row": place}
        write_shard(path, records)
        shards.append(Shard(path.name, split, len(records), path.stat().st_size, file_digest(path)))
        waiting[split].clear()

    remaining = iter(rows)
    for path in paths:
        for image in pyarrow.parquet.read_table(path, columns=["image"])["image"].to_pylist():
            row = next(remaining)
            if row["split"] != "excluded":
                waiting[row["split"]].append((row, image))
                if len(waiting[row["split"]]) == preparation.rows_per_shard:
                    flush(row["split"])
    for split in waiting:
        if waiting[split]:
            flush(split)
    return shards
