"""Commands that make pictures: new images, reconstructions, edits."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isic_vq.cli.app import CorruptShareOption, ModelOption, app, check_first, quiet_transformers
from isic_vq.cli.pictures import announce_other_images, read_images

if TYPE_CHECKING:
    import torch

    from isic_vq.models.modeling_isic_vq import IsicVQModel


MAX_SHOWN = 64  # reconstructions in a grid
MAX_PNGS = 4096  # images that are made at once, in about a gigabyte


@app.command(
    epilog="Examples:\n\n  isic-vq generate -n 16\n\n  isic-vq generate -n 8 --label melanoma --seed 1 --guidance-scale 2\n\n"
    "  isic-vq generate -n 100000 --label melanoma --label nevus --shards parquet -o generated"
)
def generate(
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="How many images.")] = 16,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            "-l",
            help="Diagnosis (name, alias or id); repeat it to give one per image, or, with --shards, several that "
            "take turns.",
        ),
    ] = None,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the images.")] = Path("samples"),
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) alone.")] = 0,
    batch_size: Annotated[
        int, typer.Option(help="Images computed at once; another number may round an image differently.")
    ] = 16,
    backend: Annotated[
        str,
        typer.Option(
            help="eager, compiled (needs numba), cuda_graph, or auto: the fastest of those tested on such a device."
        ),
    ] = "auto",
    temperature: Annotated[float, typer.Option(help="Below 1: safer, above 1: wilder.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep this many most likely codes.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the codes that hold this much probability.")
    ] = None,
    guidance_scale: Annotated[float, typer.Option(help="1 is off; larger follows the label more.")] = 1.0,
    guidance_power: Annotated[
        float | None,
        typer.Option(help="p: guidance grows over rows or scales by (1 - cos(pi t^p)) / 2; off by default."),
    ] = None,
    cluster: Annotated[
        int | None,
        typer.Option(help="Of a prior with clusters, the one of all images; drawn for each by default."),
    ] = None,
    shards: Annotated[
        str | None, typer.Option(help="Write parquet or webdataset shards: for large sets.")
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(help="Images per shard, 1024 by default: a multiple of --batch-size.")
    ] = None,
) -> None:
    """Generate images and write them as PNGs, with one grid of all of them, or as shards of a large set.

    With --shards it may run in many processes (torchrun, accelerate launch), and goes on where it was interrupted.
    """
    if shards is None and num_images > MAX_PNGS:
        raise ValueError(
            f"num_images is {num_images}: expected at most {MAX_PNGS} PNGs; add --shards parquet for a larger set"
        )
    check_first(model, labels=label or ())
    from isic_vq.hub.pretrained import load_model
    from isic_vq.models.modeling_isic_vq import IsicVQModel
    from isic_vq.models.sampling import Sampling

    quiet_transformers()
    sampling = Sampling(temperature, top_k, top_p, guidance_scale, guidance_power)
    settings: Any = {"seed": seed, "sampling": sampling, "cluster": cluster, "backend": backend}
    if shards is None and shard_size is not None:
        raise ValueError(
            "--shard-size is given without --shards: add --shards parquet or --shards webdataset"
        )
    if shards is None:
        announce_other_images(output, {*_image_names(num_images), "grid.png"})
        settings |= {"num_images": num_images, "batch_size": batch_size}
        _write_images(load_model(IsicVQModel, model), label or [], settings, output, model)
        typer.echo(f"wrote {num_images} images and {output / 'grid.png'}")
        return
    settings |= {"format": shards, "block_size": batch_size}
    settings["images_per_shard"] = 1024 if shard_size is None else shard_size
    _write_shards(load_model(IsicVQModel, model), label or [], num_images, settings, output)


def _write_shards(
    model: "IsicVQModel", labels: list[str], num_images: int, settings: dict[str, Any], output: Path
) -> None:
    """Generate this process's shards of a set of images."""
    from isic_vq.generate import generate_shards
    from isic_vq.work import launched_process

    rank, world = launched_process()
    made, kept = generate_shards(
        model, output, num_images, labels or None, rank=rank, world=world, progress=True, **settings
    )
    typer.echo(f"process {rank} of {world}: wrote {made} shards to {output}, {kept} were there")


def _image_names(number: int) -> list[str]:
    return [f"image-{index:05d}.png" for index in range(number)]


def _write_images(
    model: "IsicVQModel", labels: list[str], settings: dict[str, Any], output: Path, name: str | None
) -> None:
    """Generate images and write each, and a grid of all, as PNGs."""
    from isic_vq.figures import image_grid
    from isic_vq.figures.png import write_png
    from isic_vq.hub.pretrained import resolve
    from isic_vq.models.pipeline_isic_vq import UnconditionalImageGenerationPipeline

    result = UnconditionalImageGenerationPipeline(model)(
        labels[0] if len(labels) == 1 else labels or None,
        output_type="np",
        return_codes=True,
        progress=sys.stderr.isatty(),
        **settings,
    )
    classes = {**model.config.class_names, model.prior.config.unconditional_id: "unconditional"}
    titles = [classes[index] for index in result["labels"].tolist()]
    source, seed = Path(resolve(name)).name, settings["seed"]
    for index, file in enumerate(_image_names(len(titles))):
        comment = f"synthetic image, seed {seed}, index {index}"
        about = {"Title": titles[index], "Source": source, "Comment": comment}
        write_png(result["images"][index], output / file, about)
    about = {"Source": source, "Comment": f"synthetic images, seed {seed}"}
    write_png(image_grid(result["images"], labels=titles if labels else None), output / "grid.png", about)


@app.command(
    epilog="Examples:\n\n  isic-vq reconstruct my_images/\n\n  isic-vq reconstruct photo.jpg -o out/"
)
def reconstruct(
    data: Annotated[str, typer.Argument(help="Image file, folder, or a URI as for --data.")],
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNGs.")] = Path(
        "reconstructions"
    ),
    limit: Annotated[int, typer.Option(min=1, help="At most this many images.")] = 64,
    max_corrupt_share: CorruptShareOption = 0.01,
) -> None:
    """Send images through the tokenizer and back, and write both beside each other."""
    check_first(model, sources=[data])
    import itertools
    from collections.abc import Iterator

    import numpy as np

    from isic_vq.evaluation.reconstruction import evaluate_reconstruction
    from isic_vq.figures.grid import image_grid, paired_grid
    from isic_vq.figures.png import write_png
    from isic_vq.hub.pretrained import load_model
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.models.modeling_vqvae import VQVAEModel

    quiet_transformers()
    tokenizer = load_model(VQVAEModel, model)
    processor = IsicVQImageProcessor(size=tokenizer.config.image_size)
    batches, _ = read_images(data, processor, max_corrupt_share, stream=True)
    numbers: Iterator[int] = itertools.count()
    shown: list[tuple[Any, Any]] = []

    def first() -> "Iterator[torch.Tensor]":
        left = limit
        while left > 0 and (batch := next(batches, None)) is not None:
            yield batch[1][:left]
            left -= len(batch[1])
        if not shown:
            raise ValueError(f"{data} holds no readable image")

    def write(originals: "torch.Tensor", codes: "torch.Tensor", decoded: "torch.Tensor") -> None:
        before, after = (processor.postprocess(images, output_type="np") for images in (originals, decoded))
        for pair in zip(before, after, strict=True):
            index = next(numbers)
            write_png(pair[1], output / f"image-{index:05d}.png", {"Comment": "VQ-VAE reconstruction"})
            if index < MAX_SHOWN:
                shown.append(pair)

    result = evaluate_reconstruction(tokenizer, first(), write)
    before, after = (np.stack(images) for images in zip(*shown, strict=True))
    write_png(image_grid(after), output / "reconstructions.png", {"Comment": "VQ-VAE reconstructions"})
    pairs, _ = paired_grid(before, after)
    write_png(pairs, output / "grid.png", {"Comment": "originals above reconstructions"})
    rest = f" of the first {MAX_SHOWN}" if result.num_images > MAX_SHOWN else ""
    typer.echo(
        f"{result.num_images} images: PSNR {result.psnr:.2f} dB, SSIM {result.ssim:.4f}; wrote {output / 'grid.png'}{rest}"
    )


@app.command(
    epilog="Examples:\n\n  isic-vq edit photo.jpg --box 150,100,450,350 --label melanoma\n\n"
    "  isic-vq edit photo.jpg --mask hairs.png -n 1 --dilation 1\n\n  isic-vq edit photo.jpg --lower-half -n 8"
)
def edit(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    mask: Annotated[
        Path | None, typer.Option(help="Picture of the image's size; what is white is drawn anew.")
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(metavar="LEFT,TOP,RIGHT,BOTTOM", help="Draw this anew; in the image's pixels."),
    ] = None,
    lower_half: Annotated[bool, typer.Option("--lower-half", help="Draw the lower half anew.")] = False,
    label: Annotated[
        str | None, typer.Option("--label", "-l", help="Diagnosis (name, alias or id) to draw it as.")
    ] = None,
    num_images: Annotated[
        int, typer.Option("--num-images", "-n", min=1, max=256, help="How many variants to draw.")
    ] = 4,
    particles: Annotated[
        int, typer.Option(max=4096, help="Candidates per variant; more fit the rest of the image better.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Variant i depends on (seed, i) alone.")] = 0,
    dilation: Annotated[int, typer.Option(help="Codes by which the mask grows on all sides.")] = 0,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNGs.")] = Path("edited"),
) -> None:
    """Draw a part of an image anew so that it fits the rest, in several variants."""
    check_first(model, labels=[] if label is None else [label])
    import numpy as np
    import torch
    from tqdm import tqdm

    from isic_vq.figures import image_grid
    from isic_vq.figures.png import write_png
    from isic_vq.hub.pretrained import load_model, resolve
    from isic_vq.models.editing import pixel_mask
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.models.modeling_isic_vq import IsicVQModel

    quiet_transformers()
    editor = load_model(IsicVQModel, model)
    config = editor.config
    processor = IsicVQImageProcessor(size=config.vqvae_config.image_size)
    marked = _marked_pixels(processor, image, mask, box, lower_half)
    original = processor(image, return_tensors="pt")["pixel_values"].to(editor.device)
    steps = num_images * config.prior_config.num_steps
    with tqdm(total=steps, disable=not sys.stderr.isatty(), unit="step", desc="editing") as bar:
        edited: Any = editor.inpaint(
            original.expand(num_images, -1, -1, -1),
            marked,
            label,
            num_particles=particles,
            seed=seed,
            dilation=dilation,
            on_step=bar.update,
        )
    blue = torch.tensor([0.1, 0.4, 1.0], device=editor.device)[:, None, None]
    redrawn = pixel_mask(editor.vqvae.code_grids(edited.mask[:1])[-1], config.vqvae_config.image_size)
    shown = torch.where(redrawn, (original + blue) / 2, original)
    before = processor.postprocess(torch.cat([original, shown]), output_type="np")
    after = processor.postprocess(edited.pixel_values, output_type="np")
    classes = {**config.class_names, editor.prior.config.unconditional_id: "unconditional"}
    title = classes[edited.labels[0].item()]
    about = {"Title": title, "Source": Path(resolve(model)).name}
    for index, pixels in enumerate(after):
        comment = f"edited image, seed {seed}, index {index}"
        write_png(pixels, output / f"image-{index:05d}.png", {**about, "Comment": comment})
    names = ["original", "drawn anew", *(f"{title} {index}" for index in range(num_images))]
    about["Comment"] = f"an image and its edits, seed {seed}"
    write_png(image_grid(np.concatenate([before, after]), labels=names), output / "grid.png", about)
    if edited.num_particles[0] < particles:
        typer.echo("exact with one particle: nothing is kept after the first code drawn anew")
    else:
        for index, ess in enumerate(edited.ess):
            typer.echo(
                f"variant {index}: effective sample size {ess[-1]:.1f} of {particles} particles at the end, "
                f"{ess.min():.1f} in the poorest row"
            )
    typer.echo(f"wrote {num_images} variants and {output / 'grid.png'}")


def _marked_pixels(
    processor: Any, image: Path, mask: Path | None, box: str | None, lower_half: bool
) -> "torch.Tensor":
    """The pixels `(H, W)` bool to draw anew, from the one option that names them."""
    import torch
    from PIL import Image

    if (mask is not None) + (box is not None) + lower_half != 1:
        raise ValueError("what to draw anew: expected one of --mask, --box and --lower-half")
    if lower_half:
        side = processor.size["height"]
        return (torch.arange(side) >= side // 2)[:, None].expand(side, side)
    size = processor.load_image(image).size
    if mask is not None:
        picture = processor.load_image(mask)
        if picture.size != size:
            raise ValueError(
                f"--mask {mask} has {picture.size[0]} x {picture.size[1]} pixels: expected {size[0]} x {size[1]}, the "
                "size of the image"
            )
        marked = processor.to_mask(mask)
    else:
        try:
            left, top, right, bottom = map(int, box.split(","))  # type: ignore[union-attr]
        except ValueError as error:
            raise ValueError(f"--box is {box!r}: expected LEFT,TOP,RIGHT,BOTTOM in whole pixels") from error
        if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
            raise ValueError(
                f"--box is {box}: expected 0 <= left < right <= {size[0]} and 0 <= top < bottom <= {size[1]}"
            )
        picture = Image.new("L", size)
        picture.paste(255, (left, top, right, bottom))
        marked = processor.to_mask(picture)
    if not marked.any():
        raise ValueError("nothing is marked in the centred square of the image, which is what the model sees")
    return torch.from_numpy(marked)
