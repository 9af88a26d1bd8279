"""Commands that train: a model by its recipe, the codes that a prior learns, the figures of a run."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from isic_vq.cli.app import (
    ClassesOption,
    DataOption,
    DeviceOption,
    OtherClassesOption,
    Overrides,
    ResumeOption,
    app,
    check_first,
    declared_classes,
    open_model,
    quiet_transformers,
)
from isic_vq.cli.flags import options_of

# What one does with a stage's model.
NEXT = {
    "vqvae": "encode {model} --data SOURCE --part train -o train.parquet",
    "prior": "generate -m {model}",
    "decoder": "reconstruct SOURCE -m {model}",
    "classifier": "export {run} DIR",
}
CHANGED = {"frechet_distance": "Frechet distance", "feature_distance": "feature distance", "psnr": "PSNR"}


@app.command(
    epilog="Examples:\n\n  isic-vq train examples/configs/vqvae-f8.yaml\n\n"
    "  isic-vq train examples/configs/vqvae-tiny.yaml data.train=folder:my_images loop.max_steps=500"
)
def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG", help="YAML recipe; its key stage says what is trained. Or stage=STAGE."
        ),
    ],
    overrides: Overrides = None,
    resume: ResumeOption = False,
) -> None:
    """Train a tokenizer (stage vqvae), a prior on its codes, a decoder with texture, or an image classifier.

    Several processes share a run under torchrun or accelerate launch.
    """
    from isic_vq.training.load import check_places, load_stage

    is_file = "=" not in config or Path(config).is_file()
    changes = [*([] if is_file else [config]), *(overrides or [])]
    recipe = load_stage(Path(config) if is_file else None, changes, resume)
    check_places(recipe)
    check_first(folder=Path(recipe.output_dir))
    stage = import_module(f"isic_vq.training.{recipe.stage}")  # imports torch
    quiet_transformers()
    result = getattr(stage, f"train_{recipe.stage}")(recipe, resume)
    if result is not None:  # of several processes, the main one tells
        model = f"{recipe.output_dir}/model"
        typer.echo(f"{_summary(recipe.stage, result)}; wrote {model}")
        typer.echo(f"next: isic-vq {NEXT[recipe.stage].format(run=recipe.output_dir, model=model)}")


def _summary(stage: str, result: Any) -> str:
    """What a stage measured on validation images, in a line."""
    if stage == "vqvae":
        return (
            f"{result.psnr:.2f} dB, SSIM {result.ssim:.4f}, {result.usage:.1%} of codes used, perplexity "
            f"{result.perplexity:.0f} on {result.num_images} validation images"
        )
    value = result.value
    if stage == "prior":
        return (
            f"{value('bits_per_code'):.3f} bits per code on validation (unigram "
            f"{value('bits_per_code_unigram'):.3f}, flat {value('bits_per_code_flat'):.0f})"
        )
    if stage == "decoder":
        changes = [
            f"{words} {value(name, state='before'):.4g} -> {value(name):.4g}"
            for name, words in CHANGED.items()
        ]
        return f"{', '.join(changes)} dB on validation"
    return (
        f"balanced accuracy {value('balanced_accuracy'):.3f}, accuracy {value('accuracy'):.3f} on validation"
    )


@app.command(
    epilog="Example:\n\n  isic-vq encode runs/vqvae-f8/model --data folder:my_images -o runs/codes/train.parquet"
)
@options_of("data/encoding.py:Encoding", "num_views batch_size max_corrupt_share", num_views="views")
@options_of("data/parts.py:open_part", "part share licenses", share="validation-share", licenses="license")
def encode(
    model: Annotated[str, typer.Argument(help="Folder of a tokenizer, or of a whole model.")],
    data: DataOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.")],
    classes: ClassesOption = None,
    drop_other_classes: OtherClassesOption = False,
    device: DeviceOption = None,
    **settings: Any,
) -> None:
    """Write the codes of a data set: what a prior is trained on; by several processes under torchrun."""
    check_first(model, sources=[data], file=output)
    from isic_vq.data.encoding import Encoding, encode_to_file
    from isic_vq.data.parts import open_part
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.work import launched_process

    quiet_transformers()
    rank, world = launched_process()
    chosen = {key: settings.pop(key) for key in ("part", "share", "licenses") if key in settings}
    records, source = open_part(data, **chosen, classes=declared_classes(classes, drop_other_classes))
    tokenizer = open_model(model, device, tokenizer=True)
    processor = IsicVQImageProcessor(size=tokenizer.config.image_size)
    encoding = Encoding(tokenizer, processor, records, source, **settings)
    number = encode_to_file(encoding, output, rank, world, progress=rank == 0)
    if number is None:
        typer.echo(f"process {rank} of {world} is done; the last one writes {output}")
    else:
        typer.echo(f"wrote the codes of {number} images in {encoding.num_views} views to {output}")
        if number < source.num_images:
            typer.echo(f"left out, unreadable: {source.num_images - number} of {source.num_images} images")


@app.command(epilog="Example:\n\n  isic-vq figures runs/quickstart")
def figures(
    run_dir: Annotated[Path, typer.Argument(help="A run's folder, or a folder with runs below it.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: figures/ in the run.")
    ] = None,
) -> None:
    """Draw loss curves, codebook use, reconstructions and generated images of a run."""
    from isic_vq.figures import write_figures

    for path in write_figures(run_dir, output):
        typer.echo(path)
