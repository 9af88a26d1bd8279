"""Compress images to one file by a model's codes, and decompress them."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from isic_vq.codec.codec import Compressed, compress, decompress
from isic_vq.codec.container import CodecError, png_paths
from isic_vq.codec.integer_weights import training_code_counts
from isic_vq.data.classes import AUTO, NUM_LISTED, Classes, and_more
from isic_vq.data.loading import iter_batches
from isic_vq.data.sources import find_source
from isic_vq.data.sources.folder import FolderSource
from isic_vq.data.sources.image_files import image_names
from isic_vq.figures.png import write_png
from isic_vq.files import write_atomically
from isic_vq.locks import hold
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel

BATCH_SIZE = 32


class Restored(NamedTuple):
    """The PNGs of a compressed file, its number of blocks, and a sentence for each block whose images are lost."""

    paths: list[Path]
    num_blocks: int
    damage: list[str]

    def check(self, file: Path) -> None:
        if self.damage:
            listed = "; ".join(self.damage[:NUM_LISTED]) + and_more(len(self.damage))
            raise CodecError(f"{file.name} is damaged, and the images of these blocks are lost: {listed}")


def compress_images(
    model: IsicVQModel,
    data: str,
    output: Path,
    *,
    portable: bool = False,
    label: str | None = None,
    max_corrupt_share: float = 0.01,
    progress: bool = False,
) -> Compressed:
    """Compress all images of a source to one file; lossy, at the model's resolution.

    Args:
        model: a whole model; its prior is moved to the CPU.
        data: URI of the images; a folder's are named as its files are.
        output: file, such as images.ivq.
        portable: larger, but decompresses on any machine; without it, only on one with the same arithmetic.
        label: diagnosis (name, alias or id) of all images; saves little.
        max_corrupt_share: a larger share of unreadable images is an error.
        progress: show progress bars.

    Raises:
        DataError: too many images are corrupt.
        ValueError: an unknown label, or no image can be read.
    """
    label_id = None if label is None else int(model.label_ids(label, 1)[0])
    with hold(output):
        names, codes = _encode(data, model, max_corrupt_share, progress)
        model.prior.cpu()
        counts = training_code_counts(model.name_or_path)
        with tqdm(total=len(names), unit="image", desc="coding", disable=not progress) as bar:
            result = compress(model, codes, names, label_id, counts, portable, on_block=bar.update)
        write_atomically(output, result.content)
    return result


def decompress_images(model: IsicVQModel, file: Path, output: Path, progress: bool = False) -> Restored:
    """Write the images of the intact blocks of a file of `compress_images` to a folder as PNGs.

    The model is the one that compressed the file; its prior is moved to the CPU.

    Raises:
        CodecError: no block can be read, or another model wrote the file.
    """
    content = file.read_bytes()
    device = model.vqvae.device
    model.prior.cpu()
    with tqdm(unit="image", desc="decoding", disable=not progress) as bar:
        result = decompress(model, content, training_code_counts(model.name_or_path), on_block=bar.update)
    paths = png_paths(result.names, output)
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)
    for start in range(0, len(paths), BATCH_SIZE):
        batch = slice(start, start + BATCH_SIZE)
        with torch.inference_mode():
            images = processor.postprocess(model.decode(result.codes[batch].to(device)), output_type="np")
        for pixels, path in zip(images, paths[batch], strict=True):
            write_png(pixels, path, {"Comment": "VQ-VAE reconstruction"})
    return Restored(paths, result.num_blocks, list(result.damage))


def _encode(
    data: str, model: IsicVQModel, max_corrupt_share: float, progress: bool
) -> tuple[list[str], Tensor]:
    """The names of a source's images, and their codes `(N, h, w)` on the CPU."""
    source = find_source(data, Classes.parse(AUTO))
    files = image_names(source.folder)[0] if isinstance(source, FolderSource) else None
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)
    names: list[str] = []
    codes = []
    batches = iter_batches(
        source.records(), processor, batch_size=BATCH_SIZE, max_corrupt_share=max_corrupt_share
    )
    with tqdm(unit="image", desc="encoding", disable=not progress) as bar, torch.inference_mode():
        for batch in batches:
            ids = batch["isic_ids"] if files is None else [files[row] for row in batch["indices"].tolist()]
            codes.append(model.encode(batch["pixel_values"].to(model.vqvae.device)).cpu())
            names += ids
            bar.update(len(ids))
    if not names:
        raise ValueError(f"{data} holds no readable image")
    return names, torch.cat(codes)
