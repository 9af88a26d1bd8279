"""Compress code grids to a file and back, block by block.

A block is coded under the prior and decoded again at once; if that gives other codes, it is coded with static tables
instead, and counted. With `portable` all blocks use static tables, which do not depend on floating-point arithmetic.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from isic_vq.codec.container import (
    MAX_IMAGES,
    Block,
    CodecError,
    Settings,
    block_name,
    check_names,
    read_container,
    write_container,
)
from isic_vq.codec.integer_weights import Weights, static_weights, table_hash
from isic_vq.codec.prior_coder import PriorCoder, coder_of
from isic_vq.codec.range_coder import CodeDecoder, CodeEncoder
from isic_vq.data.code_cache import tokenizer_hash
from isic_vq.models.checks import expect
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_pixelcnn import PixelCNNModel

LANES = 64  # images in a block
THREADS = 1  # more threads gain little on matrices of this size, and another number rounds otherwise


@dataclass(frozen=True)
class Compressed:
    """A compressed file and its numbers."""

    content: bytes
    num_images: int
    num_blocks: int
    # Blocks that are coded with static tables because the prior did not decode them exactly
    num_fallbacks: int
    payload_bytes: int  # bytes of codes; all others are names, checksums and headers


@dataclass(frozen=True)
class Decompressed:
    """The intact images of a file: names, codes `(N, h, w)` int64 in [0, K), and a sentence for each damaged block."""

    names: list[str]
    codes: Tensor
    num_blocks: int
    damage: list[str]


def compress(
    model: IsicVQModel,
    codes: Tensor,
    names: Sequence[str],
    label: int | None = None,
    code_counts: Sequence[int] | None = None,
    portable: bool = False,
    lanes: int = LANES,
    threads: int = THREADS,
    on_block: Callable[[int], object] | None = None,
) -> Compressed:
    """Compress the codes of images losslessly.

    Args:
        model: its prior is on the CPU, unless `portable`.
        codes (`torch.LongTensor` of shape `(N, h, w)`): in [0, K), on the CPU.
        names: unique relative paths of the images.
        label: class id that conditions the prior; None is unconditional.
        code_counts: counts of the K codes in training, for the static table; None makes it uniform. Decoding needs the
            same counts.
        portable: use the static table for all blocks: larger, but independent of machine and torch.
        lanes: maximum number of images in a block.
        threads: of torch while it computes probabilities, also when decoding.
        on_block: called with the number of images of each finished block, for progress bars.

    Raises:
        CodecError: invalid names, or no images.
        ValueError: codes of another shape or range, or an argument out of range.
    """
    _check_raster(model)
    grid, num_codes = model.config.prior_config.grid_size, model.config.vqvae_config.num_codes
    if len(names) == 0:
        raise CodecError("there are no images to compress")
    if codes.shape != (len(names), grid, grid) or codes.min() < 0 or codes.max() >= num_codes:
        raise ValueError(
            f"codes have shape {tuple(codes.shape)} and lie in [{codes.min()}, {codes.max()}]: expected "
            f"({len(names)}, {grid}, {grid}) in [0, {num_codes})"
        )
    expect(1 <= lanes <= MAX_IMAGES, "lanes", lanes, f"1 to {MAX_IMAGES}")
    check_names(names)
    lanes = min(lanes, len(names))
    label = model.prior.config.unconditional_id if label is None else label
    table = _table(code_counts, num_codes)
    coder = None if portable else PriorCoder(model.prior, label, lanes, threads)
    blocks = []
    for start in range(0, len(names), lanes):
        part = codes[start : start + lanes]
        blocks.append(_encode_block(part, list(names[start : start + lanes]), coder, table))
        if on_block is not None:
            on_block(len(part))
    by_prior = sum(block.coder == "prior" for block in blocks)
    layout = coder.layout() if coder is not None and by_prior else None
    settings = Settings(tokenizer_hash(model.vqvae)[:16], num_codes, grid, label, table_hash(table), layout)
    return Compressed(
        content=write_container(settings, blocks),
        num_images=len(names),
        num_blocks=len(blocks),
        num_fallbacks=0 if portable else len(blocks) - by_prior,
        payload_bytes=sum(len(block.payload) for block in blocks),
    )


def decompress(
    model: IsicVQModel,
    content: bytes,
    code_counts: Sequence[int] | None = None,
    on_block: Callable[[int], object] | None = None,
) -> Decompressed:
    """Decompress the intact blocks of a file, and name the others in `damage`; arguments are as for `compress`.

    Raises:
        CodecError: the content is no .ivq file, was made with another model or on a machine with other arithmetic, or
            holds invalid names.
    """
    settings, entries, blocks = read_container(content)
    table = _table(code_counts, model.config.vqvae_config.num_codes)
    _check_settings(settings, model, table)
    intact = [block for block in blocks if isinstance(block, Block)]
    check_names([name for block in intact for name in block.names])
    coder = None
    if settings.layout is not None and any(block.coder == "prior" for block in intact):
        coder = coder_of(settings.layout, model.prior, settings.label)
    names: list[str] = []
    grids = [torch.empty(0, settings.grid_size, settings.grid_size, dtype=torch.int64)]
    damage = []
    for number, block in enumerate(blocks):
        try:
            if isinstance(block, str):
                raise CodecError(block)
            codes = _decode_block(block, coder, table, settings.grid_size)
        except CodecError as error:
            damage.append(f"{block_name(entries, number)}: {error}")
        else:
            names += block.names
            grids.append(codes)
        if on_block is not None:
            on_block(entries[number].num_images)
    return Decompressed(names, torch.cat(grids), len(blocks), damage)


def _table(code_counts: Sequence[int] | None, num_codes: int) -> Weights:
    counts = [0] * num_codes if code_counts is None else code_counts
    if len(counts) != num_codes:
        raise ValueError(f"there are counts of {len(counts)} codes: expected {num_codes}")
    return static_weights(counts)


def _check_raster(model: IsicVQModel) -> None:
    if not isinstance(model.prior, PixelCNNModel):
        raise CodecError(
            f"the model's prior is {model.config.prior_config.model_type}: name one whose prior is a PixelCNN"
        )


def _check_settings(settings: Settings, model: IsicVQModel, table: Weights) -> None:
    _check_raster(model)
    config = model.config
    expected = (
        tokenizer_hash(model.vqvae)[:16],
        config.vqvae_config.num_codes,
        config.prior_config.grid_size,
    )
    if (settings.tokenizer, settings.num_codes, settings.grid_size) != expected:
        raise CodecError("the file was made by another tokenizer: name the model that it was compressed with")
    if settings.table != table_hash(table):
        raise CodecError(
            "the file was coded with another static table: name the checkpoint that it was compressed with"
        )
    if not 0 <= settings.label <= model.prior.config.unconditional_id:
        raise CodecError(f"the file's label {settings.label} is no class of the prior")


def _encode_block(codes: Tensor, names: list[str], coder: PriorCoder | None, table: Weights) -> Block:
    """Code a block so that decoding gives the same codes."""
    crc = _codes_crc(codes)
    if coder is not None:
        block = Block(names, "prior", coder.encode(codes), crc)
        if _decodes_to(block, codes, coder, table):
            return block
    encoder = CodeEncoder()
    encoder.push(codes.flatten().numpy(), table)
    block = Block(names, "static", encoder.payload(), crc)
    if not _decodes_to(block, codes, None, table):
        raise RuntimeError("a block does not decode with static tables: the range coder is broken")
    return block


def _decodes_to(block: Block, codes: Tensor, coder: PriorCoder | None, table: Weights) -> bool:
    try:
        return torch.equal(_decode_block(block, coder, table, codes.shape[-1]), codes)
    except CodecError:
        return False


def _decode_block(block: Block, coder: PriorCoder | None, table: Weights, grid: int) -> Tensor:
    """Codes `(n, h, w)` of a block; CodecError if they are not those that were coded."""
    number = len(block.names)
    if block.coder == "prior" and coder is not None:
        codes = coder.decode(block.payload, number)
    else:
        flat = CodeDecoder(block.payload).pull(table, number * grid * grid)
        codes = torch.from_numpy(flat).view(number, grid, grid)
    if _codes_crc(codes) != block.codes_crc:
        raise CodecError("its codes differ from the written ones: this machine computes other probabilities")
    return codes


def _codes_crc(codes: Tensor) -> int:
    return zlib.crc32(codes.numpy().astype("<i8").tobytes())
