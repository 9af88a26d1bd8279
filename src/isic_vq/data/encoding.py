"""Encode a data set in chunks, the pieces of a `Work`, and join them in a cache.

A chunk is a range of rows, or a part of a source that is streamed. Whoever finds all chunks finished joins them.
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
from numpy.typing import NDArray
from tqdm import tqdm

from isic_vq.data.augmentation import NUM_VIEWS, dihedral
from isic_vq.data.code_cache import CodeCache, read_code_cache, tokenizer_hash, write_code_cache
from isic_vq.data.loading import SkipCounter, check_share, decoded_batches
from isic_vq.data.schema import FEATURES, DataError
from isic_vq.data.sources import Source, SourceInfo
from isic_vq.data.sources.base import read_parts
from isic_vq.files import write_atomically
from isic_vq.locks import hold
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.work import Work

CHUNK_SIZE = 256  # rows
_SCHEMA = pa.schema(
    [("isic_id", pa.string()), ("diagnosis", pa.string()), ("codes", pa.binary()), ("error", pa.string())]
)


@dataclass(frozen=True)
class Encoding:
    """What is encoded, and how.

    Attributes:
        model: the tokenizer.
        processor: fixes the size.
        records: with random access, or a source that is streamed part by part.
        source: what may be published about the images.
        num_views: the first so many dihedral views of each image, 8 by default.
        batch_size: images encoded at once.
        max_corrupt_share: share of unreadable images past which to fail.

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
        if not 1 <= self.num_views <= NUM_VIEWS:
            raise ValueError(f"num_views is {self.num_views}: expected 1 to {NUM_VIEWS}")
        if self.model.config.num_codes > 2**16:
            raise ValueError(
                f"num_codes is {self.model.config.num_codes}: a code cache holds at most {2**16}"
            )

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
        """Views of an image, and the shape of the codes of each."""
        return self.num_views, *self.model.config.code_shape

    def chunks(self) -> list[Any]:
        """Ranges of rows, or parts of the source."""
        if not isinstance(self.records, Dataset):
            return self.records.parts()
        starts = range(0, len(self.records), CHUNK_SIZE)
        return [range(start, min(start + CHUNK_SIZE, len(self.records))) for start in starts]

    def open(self, chunk: Any) -> Dataset | IterableDataset:
        """The records of a chunk."""
        if isinstance(self.records, Dataset):
            return self.records.select(chunk)
        arguments = {"source": self.records, "parts": [chunk]}
        return IterableDataset.from_generator(read_parts, gen_kwargs=arguments, features=FEATURES)


def encode_source(*arguments: Any, progress: bool = False, **options: Any) -> CodeCache:
    """Encode all images in this process, in memory; takes what `Encoding` does.

    Raises:
        ValueError: as `Encoding`.
        DataError: too many images are corrupt, or none is left.
    """
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
    """Encode this process's chunks, but for those that are there, and join all once they are.

    An output that holds these codes already is left as it is.

    Args:
        encoding: the same in all processes.
        output: the cache; chunks wait in a folder beside it until it is written.
        rank: number of this process.
        world: number of processes.
        progress: show a progress bar, which counts this process's images.

    Returns:
        How many images the cache holds, or None if it waits for another process.

    Raises:
        DataError: too many images are corrupt, or none is left; or the folder was begun with other settings.
        InUseError: another launch is at it.
        OSError: a file cannot be written; it is named.
    """
    chunks, folder = encoding.chunks(), output.with_name(f"{output.name}.parts")
    names = [f"chunk-{number:06d}.parquet" for number in range(len(chunks))]
    work = Work(folder, names, "chunks", rank, world)
    with hold(output, rank, world):
        if (number := _written(encoding, output, folder)) is not None:
            return number
        work.begin(encoding.settings)
        missing = work.missing
        there = sum(
            pq.read_metadata(work.path(number)).num_rows for number in work.own if number not in missing
        )
        share = -(-encoding.source.num_images // world)
        counter = SkipCounter(encoding.max_corrupt_share, share)
        with work.progress(share, there, "encoding", progress) as bar:
            for number in missing:
                table = _encode_chunk(encoding, chunks[number], counter)
                sink = pa.BufferOutputStream()
                pq.write_table(table, sink, compression="zstd")
                with work.named(work.path(number)):
                    write_atomically(work.path(number), sink.getvalue().to_pybytes())
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
    """How many images the output holds if another process has joined the chunks, which are removed then; else None."""
    try:
        cache = read_code_cache(output)
    except DataError:  # not there, or something else, which is about to be replaced
        return None
    found = (cache.tokenizer_hash, cache.source, cache.codes.shape[1:])
    if found != (tokenizer_hash(encoding.model), encoding.source, encoding.shape):
        return None
    shutil.rmtree(work, ignore_errors=True)
    return len(cache.isic_ids)


@torch.inference_mode()
def _encode_chunk(encoding: Encoding, chunk: Any, counter: SkipCounter) -> pa.Table:
    """Ids, diagnoses and codes of a chunk's images, and the errors of those that cannot be read, in order.

    Raises:
        DataError: too many of the images that `counter` has counted are corrupt.
    """
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
    """The cache of all chunks."""
    table = pa.concat_tables(tables)
    errors = [error for error in table["error"].to_pylist() if error is not None]
    if len(errors) == table.num_rows:
        raise DataError(f"{encoding.source.name} holds no readable image")
    check_share(errors, len(errors), table.num_rows, encoding.max_corrupt_share)
    sound = table.filter(pa.compute.is_valid(table["codes"]))
    return CodeCache(
        codes=_codes(sound["codes"].to_pylist(), encoding.shape),
        isic_ids=sound["isic_id"].to_pylist(),
        diagnoses=sound["diagnosis"].to_pylist(),
        num_codes=encoding.model.config.num_codes,
        tokenizer_hash=tokenizer_hash(encoding.model),
        source=encoding.source,
    )


def _codes(grids: list[bytes], shape: tuple[int, ...]) -> NDArray[np.uint16]:
    return np.frombuffer(b"".join(grids), np.uint16).reshape(len(grids), *shape)
