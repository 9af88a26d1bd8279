"""The commands of the codec: images to one small file, and back."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isic_vq.cli.app import CorruptShareOption, ModelOption, app, check_first, quiet_transformers

if TYPE_CHECKING:
    import torch

    from isic_vq.models.modeling_isic_vq import IsicVQModel


@app.command(
    epilog="Examples:\n\n  isic-vq compress my_images/ images.ivq\n\n  isic-vq compress my_images/ images.ivq --portable"
)
def compress(
    data: Annotated[str, typer.Argument(help="Folder of images, or a URI as for --data.")],
    output: Annotated[Path, typer.Argument(help="File to write, such as images.ivq.")],
    model: ModelOption = None,
    portable: Annotated[
        bool,
        typer.Option(
            "--portable",
            help="Larger, but decompresses on any machine: without it, on one that computes alike.",
        ),
    ] = False,
    label: Annotated[
        str | None,
        typer.Option("--label", "-l", help="Diagnosis (name, alias or id) of all images; saves little."),
    ] = None,
    max_corrupt_share: CorruptShareOption = 0.01,
) -> None:
    """Compress images to a few hundred bytes each; lossy, at the model's resolution.

    What comes back is the tokenizer's reconstruction: never the only copy of an image.
    """
    check_first(model, sources=[data])
    from tqdm import tqdm

    from isic_vq.codec.codec import compress as compress_codes
    from isic_vq.codec.integer_weights import training_code_counts
    from isic_vq.files import write_atomically
    from isic_vq.hub.pretrained import load_model
    from isic_vq.locks import hold
    from isic_vq.models.modeling_isic_vq import IsicVQModel

    quiet_transformers()
    loaded = load_model(IsicVQModel, model)
    label_id = None if label is None else int(loaded.label_ids(label, 1)[0])
    with hold(output):
        names, codes = _encode(data, loaded, max_corrupt_share)
        loaded.prior.cpu()
        with tqdm(total=len(names), unit="image", desc="coding", disable=not sys.stderr.isatty()) as bar:
            result = compress_codes(
                loaded, codes, names, label_id, training_code_counts(model), portable, on_block=bar.update
            )
        write_atomically(output, result.content)
    size = len(result.content)
    typer.echo(
        f"wrote {result.num_images} images in {result.num_blocks} blocks to {output}: {size:,} bytes, "
        f"{size / result.num_images:.1f} per image, of which {(size - result.payload_bytes) / result.num_images:.1f} "
        "are names, checksums and headers"
    )
    if result.num_fallbacks:
        typer.echo(
            f"{result.num_fallbacks} blocks did not come back from the prior's probabilities and are coded with "
            "static tables"
        )


@app.command(epilog="Example:\n\n  isic-vq decompress images.ivq images/")
def decompress(
    file: Annotated[Path, typer.Argument(help="File that isic-vq compress wrote.")],
    output: Annotated[Path, typer.Argument(help="Folder for the PNGs.")],
    model: ModelOption = None,
) -> None:
    """Write the images of a compressed file as PNGs; of a damaged file, those of every intact block."""
    check_first(model)
    import torch
    from tqdm import tqdm

    from isic_vq.codec.codec import decompress as decompress_codes
    from isic_vq.codec.container import CodecError
    from isic_vq.codec.integer_weights import training_code_counts
    from isic_vq.codec.names import png_paths
    from isic_vq.data.classes import NUM_LISTED, and_more
    from isic_vq.figures.png import write_png
    from isic_vq.hub.pretrained import load_model
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.models.modeling_isic_vq import IsicVQModel

    quiet_transformers()
    content = file.read_bytes()
    loaded = load_model(IsicVQModel, model)
    device = loaded.vqvae.device
    loaded.prior.cpu()
    with tqdm(unit="image", desc="decoding", disable=not sys.stderr.isatty()) as bar:
        result = decompress_codes(loaded, content, training_code_counts(model), on_block=bar.update)
    paths = png_paths(result.names, output)
    processor = IsicVQImageProcessor(size=loaded.config.vqvae_config.image_size)
    number = 0
    for part in result.codes.split(32):
        with torch.inference_mode():
            images = processor.postprocess(loaded.decode(part.to(device)), output_type="np")
        for pixels in images:
            write_png(pixels, paths[number], {"Comment": "VQ-VAE reconstruction"})
            number += 1
    intact = result.num_blocks - len(result.damage)
    typer.echo(f"wrote {len(paths)} images to {output}; {intact} of {result.num_blocks} blocks are intact")
    if result.damage:
        listed = "; ".join(result.damage[:NUM_LISTED]) + and_more(len(result.damage))
        raise CodecError(f"{file.name} is damaged, and the images of these blocks are lost: {listed}")
    typer.echo(f"{len(content) / len(paths):.1f} bytes per image")


def _encode(data: str, model: "IsicVQModel", max_corrupt_share: float) -> tuple[list[str], "torch.Tensor"]:
    """Names and codes `(N, h, w)` on the CPU of a source's images; a folder's are named as its files are."""
    import torch
    from tqdm import tqdm

    from isic_vq.data.classes import AUTO, Classes
    from isic_vq.data.loading import iter_batches
    from isic_vq.data.sources import find_source
    from isic_vq.data.sources.folder import FolderSource
    from isic_vq.data.sources.image_files import image_names
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor

    source = find_source(data, Classes.parse(AUTO))
    files = image_names(source.folder)[0] if isinstance(source, FolderSource) else None
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)
    names: list[str] = []
    codes = []
    batches = iter_batches(source.records(), processor, batch_size=32, max_corrupt_share=max_corrupt_share)
    with tqdm(unit="image", desc="encoding", disable=not sys.stderr.isatty()) as bar, torch.inference_mode():
        for batch in batches:
            ids = batch["isic_ids"] if files is None else [files[row] for row in batch["indices"].tolist()]
            codes.append(model.encode(batch["pixel_values"].to(model.vqvae.device)).cpu())
            names += ids
            bar.update(len(ids))
    if not names:
        raise ValueError(f"{data} holds no readable image")
    return names, torch.cat(codes)
