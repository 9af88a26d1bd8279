"""Encode a data set in chunks, the pieces of a `Work`, and join them in a code cache.

A chunk is a range of rows, or a part of a streamed source. The process that finds all chunks finished joins them.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, IterableDataset
from tqdm import tqdm

from isic_vq.data.augmentation import NUM_VIEWS, dihedral
from isic_vq.data.code_cache import CodeCache, read_code_cache, tokenizer_hash, write_code_cache
from isic_vq.data.loading import SkipCounter, check_share, decoded_batches
from isic_vq.data.schema import DataError
from isic_vq.data.shards import parquet_bytes
from isic_vq.data.sources import Source, SourceInfo
from isic_vq.data.sources.base import ranges, stream_parts
from isic_vq.files import write_atomically
from isic_vq.locks import hold
from isic_vq.models.checks import expect
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.work import Work

CHUNK_SIZE = 256  # rows
_SCHEMA = pa.schema(
    [("isic_id", pa.string()), ("diagnosis", pa.string()), ("codes", pa.binary()), ("error", pa.string())]
)


@dataclass(frozen=True)
class Encoding:
    """The images to encode, and the settings.

    Attributes:
        model: the tokenizer.
        processor: fixes the size.
        records: with random access, or a source to stream part by part.
        source: the description of the images.
        num_views: number of dihedral views of each image, from view 0 on, 8 by default.
        batch_size: images encoded at once.
        max_corrupt_share: a larger share of unreadable images is an error.

    Raises:
        ValueError: `num_views` is not in 1 to 8, or the codebook is too large for uint16.
    """

    model: VQVAEModel
    processor: IsicVQImageProcessor
    records: Dataset | Source
    source: SourceInfo
    num_views: int = NUM_VIEWS
    batch_size: int = 32
    max_corrupt_share: float = 0.01

    def __post_init__(self) -> None:
        expect(1 <= self.num_views <= NUM_VIEWS, "num_views", self.num_views, f"1 to {NUM_VIEWS}")
        expect(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        num_codes = self.model.config.num_codes
        expect(num_codes <= 2**16, "num_codes", num_codes, f"at most {2**16} in a code cache")

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the codes."""
        return {
            "tokenizer_hash": tokenizer_hash(self.model),
            "source": asdict(self.source),
            "num_views": self.num_views,
            "image_size": self.processor.size["height"],
            "batch_size": self.batch_size,
            "chunk_size": CHUNK_SIZE if isinstance(self.records, Dataset) else None,
        }

    @property
    def shape(self) -> tuple[int, ...]:
        """The number of views, and the shape of the codes of each."""
        return self.num_views, *self.model.config.code_shape

    def chunks(self) -> list[Any]:
        if not isinstance(self.records, Dataset):
            return self.records.parts()
        return ranges(len(self.records), CHUNK_SIZE)

    def open(self, chunk: Any) -> Dataset | IterableDataset:
        if isinstance(self.records, Dataset):
            return self.records.select(chunk)
        return stream_parts(self.records, [chunk])


def encode_source(*arguments: Any, progress: bool = False, **options: Any) -> CodeCache:
    """Encode all images in this process, in memory; arguments are those of `Encoding`. DataError if none can be read."""
    encoding = Encoding(*arguments, **options)
    counter = SkipCounter(encoding.max_corrupt_share, encoding.source.num_images)
    tables = []
    with tqdm(total=encoding.source.num_images, unit="image", desc="encoding", disable=not progress) as bar:
        for chunk in encoding.chunks():
            tables.append(_encode_chunk(encoding, chunk, counter))
            bar.update(tables[-1].num_rows)
    return _join(encoding, tables)


def encode_to_file(
    encoding: Encoding, output: Path, rank: int = 0, world: int = 1, progress: bool = False
) -> int | None:
    """Encode this process's missing chunks, and join all chunks once they are finished.

    Returns the number of images in the cache, or None if another process is to finish it. Chunks lie in a folder beside the
    output until it is written; an output that already holds these codes stays as it is.

    Raises:
        DataError: too many images are corrupt, or none is left; the folder was begun with other settings; or the output is
            another file.
        InUseError: another launch writes the same output.
        OSError: a file, which is named, cannot be written.
    """
    if output.exists():
        with output.open("rb") as file:
            is_parquet = file.read(4) == b"PAR1"
        if not is_parquet:
            raise DataError(f"{output} is there and is no parquet file: choose another name for the codes")
    chunks, folder = encoding.chunks(), output.with_name(f"{output.name}.parts")
    names = [f"chunk-{number:06d}.parquet" for number in range(len(chunks))]
    work = Work(folder, names, "chunks", rank, world)
    with hold(output, rank, world):
        if (number := _written(encoding, output, folder)) is not None:
            return number
        work.begin(encoding.settings)
        missing = work.missing
        finished = [work.path(number) for number in work.numbers if number not in missing]
        initial = sum(pq.read_metadata(path).num_rows for path in finished)
        share = -(-encoding.source.num_images // world)
        counter = SkipCounter(encoding.max_corrupt_share, share)
        with work.progress(share, initial, "encoding", progress) as bar:
            for number in missing:
                table = _encode_chunk(encoding, chunks[number], counter)
                with work.naming(work.path(number)):
                    write_atomically(work.path(number), parquet_bytes(table))
                bar.update(table.num_rows)
        try:
            if not all((folder / name).exists() for name in names):
                return _written(encoding, output, folder)
            cache = _join(encoding, [pq.read_table(folder / name) for name in names])
        except FileNotFoundError:  # another process has joined them in between
            if (number := _written(encoding, output, folder)) is None:
                raise
            return number
        write_code_cache(cache, output)
        shutil.rmtree(folder, ignore_errors=True)  # which another process may be removing, too
        return len(cache.isic_ids)


def _written(encoding: Encoding, output: Path, work: Path) -> int | None:
    """The number of images of an output that is finished, whose chunks are then removed; None if it is not."""
    try:
        cache = read_code_cache(output)
    except DataError:  # missing, or another file, which will be replaced
        return None
    written = (cache.tokenizer_hash, cache.source, cache.codes.shape[1:])
    if written != (tokenizer_hash(encoding.model), encoding.source, encoding.shape):
        return None
    shutil.rmtree(work, ignore_errors=True)
    return len(cache.isic_ids)


@torch.inference_mode()
def _encode_chunk(encoding: Encoding, chunk: Any, counter: SkipCounter) -> pa.Table:
    """Ids, diagnoses and codes of a chunk's images, then the errors of the unreadable ones."""
    model = encoding.model.eval()
    skipped: list[str] = []
    rows: list[dict[str, Any]] = []
    for batch in decoded_batches(encoding.open(chunk), encoding.processor, encoding.batch_size):
        counter.count(batch)
        skipped += batch["skipped"]
        if not batch["isic_ids"]:
            continue
        pixel_values = batch["pixel_values"].to(model.device)
        views = [
            model.encode(dihedral(pixel_values, torch.full((len(pixel_values),), view)))
            for view in range(encoding.num_views)
        ]
        codes = torch.stack(views, dim=1).cpu().numpy().astype(np.uint16)
        for name, diagnosis, grid in zip(batch["isic_ids"], batch["diagnoses"], codes, strict=True):
            rows.append({"isic_id": name, "diagnosis": diagnosis, "codes": grid.tobytes()})
    return pa.Table.from_pylist([*rows, *({"error": error} for error in skipped)], schema=_SCHEMA)


def _join(encoding: Encoding, tables: list[pa.Table]) -> CodeCache:
    table = pa.concat_tables(tables)
    errors = [error for error in table["error"].to_pylist() if error is not None]
    if len(errors) == table.num_rows:
        raise DataError(f"{encoding.source.name} holds no readable image")
    check_share(errors, len(errors), table.num_rows, encoding.max_corrupt_share)
    sound = table.filter(pa.compute.is_valid(table["codes"]))
    return CodeCache(
        codes=np.frombuffer(b"".join(sound["codes"].to_pylist()), np.uint16).reshape(-1, *encoding.shape),
        isic_ids=sound["isic_id"].to_pylist(),
        diagnoses=sound["diagnosis"].to_pylist(),
        num_codes=encoding.model.config.num_codes,
        tokenizer_hash=tokenizer_hash(encoding.model),
        source=encoding.source,
    )
