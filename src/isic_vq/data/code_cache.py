"""Code caches: the code grids of a data set in its dihedral views, one parquet file, on which priors are trained.

The file holds the hash of the tokenizer weights that decide codes (encoder and codebook), so that codes of another
tokenizer are refused. Codes are uint16; one row per image holds all its views.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from isic_vq.data.classes import ordered_classes
from isic_vq.data.schema import DataError
from isic_vq.data.shards import parquet_bytes
from isic_vq.data.sources import SourceInfo
from isic_vq.data.sources.base import hash_ids
from isic_vq.files import write_atomically
from isic_vq.models.modeling_vqvae import VQVAEModel

METADATA_KEY = b"isic_vq"


@dataclass(frozen=True)
class CodeCache:
    """Codes of a data set."""

    # uint16 of shape (N, views, h, w), or (N, views, L) of several scales, in [0, num_codes)
    codes: NDArray[np.uint16]
    isic_ids: list[str]  # N image ids
    diagnoses: list[str]  # N class names, "unknown" for images without a class
    num_codes: int  # K of the tokenizer
    tokenizer_hash: str  # of the tokenizer that encoded them
    source: SourceInfo

    def first_views(self) -> torch.Tensor:
        """The codes `(N, ...)` int64 of the images in view 0, which changes nothing."""
        return torch.from_numpy(self.codes[:, 0].astype("int64"))

    def counts(self) -> torch.Tensor:
        """The number of times that each code occurs in all views: int64 of shape (K,)."""
        return torch.from_numpy(np.bincount(self.codes.ravel(), minlength=self.num_codes))

    def class_names(self) -> list[str]:
        """The classes that occur, in the order of `ordered_classes`."""
        return ordered_classes(self.diagnoses, self.source.classes)

    def select(self, rows: Sequence[int]) -> "CodeCache":
        """The codes of some images; DataError if `rows` is empty."""
        if not rows:
            raise DataError(f"no image of {self.source.name} is left")
        ids, diagnoses = [self.isic_ids[row] for row in rows], [self.diagnoses[row] for row in rows]
        info = replace(
            self.source,
            num_images=len(rows),
            diagnoses=dict(sorted(Counter(diagnoses).items())),
            ids_sha256=hash_ids(ids),
        )
        return replace(self, codes=self.codes[rows], isic_ids=ids, diagnoses=diagnoses, source=info)


def tokenizer_hash(model: VQVAEModel) -> str:
    """The sha256 over the tensors that decide codes: encoder, codebook, and the convolutions between scales."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("encoder.", "quantizer.codebook", "quantizer.phi.")):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_code_cache(cache: CodeCache, path: Path) -> None:
    """Write a cache as parquet, atomically."""
    _, views, *shape = cache.codes.shape
    metadata = {
        "views": views,
        "grid": shape,
        "num_codes": cache.num_codes,
        "tokenizer_hash": cache.tokenizer_hash,
        "source": asdict(cache.source),
    }
    flat = pa.array(cache.codes.ravel())
    table = pa.table(
        {
            "isic_id": cache.isic_ids,
            "diagnosis": cache.diagnoses,
            "codes": pa.FixedSizeListArray.from_arrays(flat, views * math.prod(shape)),
        }
    ).replace_schema_metadata({METADATA_KEY: json.dumps(metadata).encode()})
    write_atomically(path, parquet_bytes(table))


def read_code_cache(path: Path) -> CodeCache:
    """Read a cache; DataError if the file is missing, damaged or no code cache."""
    if not path.is_file():
        raise DataError(f"{path} is not a file: write it with isic-vq encode")
    try:
        table = pq.read_table(path)
        metadata = json.loads((table.schema.metadata or {})[METADATA_KEY])
        column = table["codes"]
        if not pa.types.is_fixed_size_list(column.type) or column.type.value_type != pa.uint16():
            raise ValueError(f"its codes are {column.type}")
        flat = column.combine_chunks().flatten().to_numpy()
        if len(flat) == 0 or flat.max() >= metadata["num_codes"]:
            raise ValueError("it holds no codes, or codes beyond num_codes")
        return CodeCache(
            codes=flat.reshape(table.num_rows, metadata["views"], *metadata["grid"]),
            isic_ids=table["isic_id"].to_pylist(),
            diagnoses=table["diagnosis"].to_pylist(),
            num_codes=metadata["num_codes"],
            tokenizer_hash=metadata["tokenizer_hash"],
            source=SourceInfo(**metadata["source"]),
        )
    except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{path.name} is not a code cache ({error}): write it with isic-vq encode") from error


def check_tokenizer(cache: CodeCache, model: VQVAEModel, name: str) -> None:
    """Raise DataError if another tokenizer encoded the cache, which the message calls `name`."""
    if cache.tokenizer_hash != tokenizer_hash(model):
        raise DataError(f"{name} was encoded by another tokenizer: encode the images again with this one")
