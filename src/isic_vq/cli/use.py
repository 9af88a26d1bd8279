"""Commands that use a model: generate, reconstruct, edit, score, compress, decompress, demo, info."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from isic_vq.cli.app import (
    DataArgument,
    DeviceOption,
    ModelOption,
    OutputOption,
    app,
    check_first,
    open_model,
    quiet_transformers,
)
from isic_vq.cli.flags import options_of


@app.command(
    epilog="Examples:\n\n  isic-vq generate -n 16\n\n  isic-vq generate -n 8 --label melanoma --seed 1 --guidance-scale 2\n\n"
    "  isic-vq generate -n 100000 --label melanoma --label nevus --shards parquet -o generated"
)
@options_of("models/sampling.py:Sampling", defaults=False)
@options_of(
    "pictures.py:write_generated", "num_images labels seed batch_size backend cluster", labels="label"
)
def generate(
    model: ModelOption = None,
    output: OutputOption = Path("samples"),
    shards: Annotated[
        str | None,
        typer.Option(
            help="Write parquet or webdataset shards, for large sets; several labels take turns, and several processes "
            "(torchrun) share the work."
        ),
    ] = None,
    shard_size: Annotated[
        int | None, typer.Option(help="Images per shard, 1024 by default: a multiple of --batch-size.")
    ] = None,
    device: DeviceOption = None,
    **settings: Any,
) -> None:
    """Generate images and write them as PNGs, with one grid of all of them, or as shards of a large set.

    With --shards, the same command resumes an interrupted set.
    """
    labels = settings.pop("labels", [])
    if shards is None and shard_size is not None:
        raise ValueError(
            "--shard-size is given without --shards: add --shards parquet or --shards webdataset"
        )
    check_first(model, labels=labels, seed=settings["seed"], folder=output)
    from isic_vq.hub.describe import training_warning
    from isic_vq.models.sampling import Sampling
    from isic_vq.pictures import other_images, write_generated

    chosen = {key: settings.pop(key) for key in vars(Sampling()) if key in settings}
    Sampling(**chosen)  # refuses what has no meaning before weights are read
    loaded = open_model(model, device)
    sampling = loaded.default_sampling.changed(chosen)
    if warning := training_warning(model):
        typer.echo(f"warning: {warning}", err=True)
    if shards is not None:
        return _generate_shards(loaded, output, labels, sampling, shards, shard_size, settings)
    others = other_images(output, settings["num_images"])
    if others:
        typer.echo(
            f"warning: {output} holds {len(others)} other images, such as {others[0]}, which stay: choose another folder to "
            "keep sets apart",
            err=True,
        )
    write_generated(
        loaded, output, labels=labels, sampling=sampling, progress=sys.stderr.isatty(), **settings
    )
    typer.echo(
        f"wrote {settings['num_images']} images to {output}; all in one picture: {output / 'grid.png'}"
    )
    return None


def _generate_shards(
    model: Any, output: Path, labels: list[str], sampling: Any, form: str, size: int | None, settings: dict
) -> None:
    from isic_vq.generate import generate_shards
    from isic_vq.work import launched_process

    rank, world = launched_process()
    if "batch_size" in settings:
        settings["block_size"] = settings.pop("batch_size")
    made, kept = generate_shards(
        model, output, labels=labels or None, sampling=sampling, format=form, images_per_shard=size or 1024,
        rank=rank, world=world, progress=True, **settings,
    )  # fmt: skip
    typer.echo(f"process {rank} of {world}: wrote {made} shards to {output}, {kept} were complete")


@app.command(
    epilog="Examples:\n\n  isic-vq reconstruct my_images/\n\n  isic-vq reconstruct photo.jpg -o out/"
)
@options_of("pictures.py:write_reconstructions", "limit max_corrupt_share")
def reconstruct(
    data: DataArgument,
    model: ModelOption = None,
    output: OutputOption = Path("reconstructions"),
    device: DeviceOption = None,
    **settings: Any,
) -> None:
    """Send images through the tokenizer and back, and write both beside each other."""
    check_first(model, sources=[data], folder=output)
    from isic_vq.pictures import MAX_SHOWN, write_reconstructions

    result = write_reconstructions(open_model(model, device, tokenizer=True), data, output, **settings)
    rest = f" of the first {MAX_SHOWN}" if result.num_images > MAX_SHOWN else ""
    typer.echo(
        f"{result.num_images} images: PSNR {result.psnr:.2f} dB, SSIM {result.ssim:.4f}; wrote {output / 'grid.png'}{rest}"
    )


@app.command(
    epilog="Examples:\n\n  isic-vq edit photo.jpg --box 150,100,450,350 --label melanoma\n\n"
    "  isic-vq edit photo.jpg --mask hairs.png -n 1 --dilation 1\n\n  isic-vq edit photo.jpg --lower-half -n 8"
)
@options_of("pictures.py:write_edits", "mask lower_half label num_images particles seed dilation blend")
def edit(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    box: Annotated[
        str | None,
        typer.Option(metavar="LEFT,TOP,RIGHT,BOTTOM", help="Region to redraw, in the image's pixels."),
    ] = None,
    model: ModelOption = None,
    output: OutputOption = Path("edited"),
    device: DeviceOption = None,
    **settings: Any,
) -> None:
    """Redraw a part of an image so that it fits the rest, in several variants."""
    labels = [settings["label"]] if "label" in settings else []
    check_first(model, labels=labels, seed=settings["seed"], folder=output)
    if box is not None:
        settings["box"] = _numbers(box)
    from tqdm import tqdm

    from isic_vq.pictures import write_edits

    editor = open_model(model, device)
    steps = settings["num_images"] * editor.config.prior_config.num_steps
    with tqdm(total=steps, disable=not sys.stderr.isatty(), unit="step", desc="editing") as bar:
        edited: Any = write_edits(editor, image, output, on_step=bar.update, **settings)
    if edited.num_particles[0] < settings["particles"]:
        typer.echo("exact with one particle: nothing is kept after the first code that is redrawn")
    else:
        for index, ess in enumerate(edited.ess):
            typer.echo(
                f"variant {index}: effective sample size {ess[-1]:.1f} of {settings['particles']} particles at the end, "
                f"{ess.min():.1f} in the poorest row"
            )
    typer.echo(f"wrote {settings['num_images']} variants and {output / 'grid.png'}")


def _numbers(box: str) -> tuple[int, ...]:
    try:
        left, top, right, bottom = map(int, box.split(","))
    except ValueError as error:
        raise ValueError(f"--box is {box!r}: expected LEFT,TOP,RIGHT,BOTTOM in whole pixels") from error
    return left, top, right, bottom


@app.command(
    epilog="Examples:\n\n  isic-vq score my_images/\n\n  isic-vq score photo.jpg --marginalize -o out/"
)
@options_of("pictures.py:write_scores", "label marginalize limit train_codes max_corrupt_share")
def score(
    data: DataArgument,
    model: ModelOption = None,
    output: OutputOption = Path("scores"),
    device: DeviceOption = None,
    **settings: Any,
) -> None:
    """Measure how likely the prior finds images, and map where they surprise it."""
    check_first(model, sources=[data], codes=[settings.get("train_codes")], folder=output)
    from isic_vq.pictures import write_scores

    scorer = open_model(model, device)
    rows = write_scores(scorer, data, output, progress=sys.stderr.isatty(), **settings)
    bits = [row["bits_per_code"] for row in rows]
    typer.echo(
        f"{len(rows)} images: {sum(bits) / len(bits):.3f} bits per code ({rows[0]['label']}), from {min(bits):.3f} to "
        f"{max(bits):.3f}; wrote {output / 'scores.csv'}"
    )


@app.command(
    epilog="Examples:\n\n  isic-vq compress my_images/ images.ivq\n\n  isic-vq compress my_images/ images.ivq --portable"
)
@options_of("codec/image_archive.py:compress_images", "portable label max_corrupt_share")
def compress(
    data: Annotated[str, typer.Argument(help="Folder of images, or a URI as for --data of encode.")],
    output: Annotated[Path, typer.Argument(help="File to write, such as images.ivq.")],
    model: ModelOption = None,
    device: DeviceOption = None,
    **settings: Any,
) -> None:
    """Compress images to a few hundred bytes each; lossy, at the model's resolution.

    Decompressing gives the tokenizer's reconstructions: keep the originals.
    """
    check_first(model, sources=[data], file=output)
    from isic_vq.codec.image_archive import compress_images

    coder = open_model(model, device)
    result = compress_images(coder, data, output, progress=sys.stderr.isatty(), **settings)
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
    device: DeviceOption = None,
) -> None:
    """Write the images of a compressed file as PNGs; of a damaged file, those of every intact block."""
    check_first(model, folder=output)
    from isic_vq.codec.image_archive import decompress_images

    coder = open_model(model, device)
    restored = decompress_images(coder, file, output, sys.stderr.isatty())
    number, intact = len(restored.paths), restored.num_blocks - len(restored.damage)
    typer.echo(f"wrote {number} images to {output}; {intact} of {restored.num_blocks} blocks are intact")
    restored.check(file)
    typer.echo(f"{file.stat().st_size / number:.1f} bytes per image")


@app.command(
    epilog="Examples:\n\n  isic-vq demo\n\n  isic-vq demo --index runs/codes/train.parquet --port 8000"
)
@options_of("demo/server.py:serve", "host port index share")
def demo(model: ModelOption = None, device: DeviceOption = None, **settings: Any) -> None:
    """Open a page in the browser: generate, reconstruct, edit, and find the nearest training images."""
    check_first(model)
    from isic_vq.demo.server import serve

    quiet_transformers()
    serve(model, lambda url: typer.echo(f"serving at {url} (Ctrl+C stops)"), device=device, **settings)


@app.command(epilog="Examples:\n\n  isic-vq info\n\n  isic-vq info model_cards/isic-vq-128 --all")
def info(
    model: Annotated[str | None, typer.Argument(help="Model folder or Hub id.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every number of the model's reports, too.")
    ] = False,
) -> None:
    """Describe a model: classes, codes, parameters, licence, training images and headline numbers."""
    check_first(model)
    from isic_vq.evaluation.report_tables import report_lines
    from isic_vq.hub.describe import describe_model, read_reports, training_details

    quiet_transformers()
    lines = describe_model(model)
    if everything:
        lines += training_details(model) + [
            line for report in read_reports(model) for line in report_lines(report)
        ]
    for line in lines:
        typer.echo(line)
