"""The command line, `isic-vq COMMAND`.

Commands parse arguments, call the library and print what they wrote. Everything heavy is imported inside
them, so that `isic-vq --help` does not pay for torch. Errors are one line; `--debug` shows the traceback.
"""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from isic_vq import __version__

if TYPE_CHECKING:
    import torch

    from isic_vq.evaluation.report import Report


class _Commands(TyperGroup):
    """The commands; an interrupted one says where it stopped, which typer alone would swallow."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            typer.echo(f"interrupted: {error}" if str(error) else "interrupted", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Commands,
    help="Discrete generative models of dermoscopy images. A research tool, not a diagnostic device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
train_app = typer.Typer(help="Train a tokenizer or a prior.", no_args_is_help=True)
app.add_typer(train_app, name="train")

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Model folder or Hub id; default: the shipped checkpoint.")
]
DataOption = Annotated[
    str, typer.Option("--data", help="parquet:PATTERN, folder:DIR, synthetic:NUM[:SEED] or a path.")
]
CorruptShareOption = Annotated[
    float, typer.Option("--max-corrupt-share", help="Share of unreadable images past which to fail.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="YAML recipe.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the recipe.")
]

_debug = False


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"isic-vq {__version__}")
        raise typer.Exit


@app.callback()
def configure(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Set up messages for every command."""
    global _debug
    _debug = debug
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("isic_vq").setLevel(logging.INFO)


@app.command(
    epilog="Examples:\n\n  isic-vq generate -n 16\n\n  isic-vq generate -n 8 --label melanoma --seed 1 --guidance-scale 2"
)
def generate(
    num_images: Annotated[int, typer.Option("--num-images", "-n", help="How many images.")] = 16,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", help="Diagnosis (name, alias or id); repeat it to give one per image."),
    ] = None,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNGs.")] = Path("samples"),
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) alone.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images sampled at once.")] = 16,
    temperature: Annotated[float, typer.Option(help="Below 1: safer, above 1: wilder.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep this many most likely codes.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the codes that hold this much probability.")
    ] = None,
    guidance_scale: Annotated[float, typer.Option(help="1 is off; larger follows the label more.")] = 1.0,
) -> None:
    """Generate images and write them as PNGs, with one grid of all of them."""
    from isic_vq.figures import image_grid
    from isic_vq.hub import load_model, resolve
    from isic_vq.models.modeling_isic_vq import IsicVQModel
    from isic_vq.models.pipeline_isic_vq import UnconditionalImageGenerationPipeline

    _quiet_transformers()
    pipe = UnconditionalImageGenerationPipeline(load_model(IsicVQModel, model))
    result = pipe(
        label if label and len(label) > 1 else (label[0] if label else None),
        num_images=num_images,
        seed=seed,
        batch_size=batch_size,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        guidance_scale=guidance_scale,
        output_type="np",
        return_codes=True,
        progress=sys.stderr.isatty(),
    )
    classes = {**pipe.model.config.class_names, pipe.model.prior.config.unconditional_id: "unconditional"}
    names = [classes[index] for index in result["labels"].tolist()]
    source = Path(resolve(model)).name
    for index, (pixels, name) in enumerate(zip(result["images"], names, strict=True)):
        about = {"Title": name, "Source": source, "Comment": f"synthetic image, seed {seed}, index {index}"}
        _write_png(pixels, output / f"image-{index:05d}.png", about)
    about = {"Source": source, "Comment": f"synthetic images, seed {seed}"}
    _write_png(image_grid(result["images"], labels=names if label else None), output / "grid.png", about)
    typer.echo(f"wrote {num_images} images and {output / 'grid.png'}")


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
    import itertools

    import torch

    from isic_vq.evaluation.reconstruction import evaluate_reconstruction
    from isic_vq.figures.grid import image_grid, paired_grid
    from isic_vq.hub import load_model
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.models.modeling_vqvae import VQVAEModel

    _quiet_transformers()
    tokenizer = load_model(VQVAEModel, model)
    processor = IsicVQImageProcessor(size=tokenizer.config.image_size)
    if Path(data).is_file() and not data.endswith(".parquet"):
        originals = processor(data, return_tensors="pt")["pixel_values"]
    else:
        parts = _images(data, processor, max_corrupt_share)
        originals = torch.cat(
            list(itertools.islice(itertools.chain.from_iterable(p.split(1) for p in parts), limit))
        )
    result = evaluate_reconstruction(tokenizer, originals.split(32))
    decoded = torch.cat(
        [tokenizer.decode(tokenizer.encode(part.to(tokenizer.device))) for part in originals.split(32)]
    )
    before, after = (processor.postprocess(images, output_type="np") for images in (originals, decoded))
    for index, pixels in enumerate(after):
        _write_png(pixels, output / f"image-{index:05d}.png", {"Comment": "VQ-VAE reconstruction"})
    _write_png(image_grid(after), output / "reconstructions.png", {"Comment": "VQ-VAE reconstructions"})
    pairs, _ = paired_grid(before, after)
    _write_png(pairs, output / "grid.png", {"Comment": "originals above reconstructions"})
    typer.echo(
        f"{result.num_images} images: PSNR {result.psnr:.2f} dB, SSIM {result.ssim:.4f}; wrote {output / 'grid.png'}"
    )


@app.command(
    epilog="Example:\n\n  isic-vq encode runs/vqvae-f8/model --data folder:my_images -o runs/codes/train.parquet"
)
def encode(
    model: Annotated[str, typer.Argument(help="Folder of a tokenizer, or of a whole model.")],
    data: DataOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.")],
    views: Annotated[int, typer.Option(help="Dihedral views per image, 1 to 8.")] = 8,
    part: Annotated[
        str, typer.Option(help="all, or the train or validation part that training splits off by itself.")
    ] = "all",
    validation_share: Annotated[float, typer.Option(help="As data.validation_share of the recipe.")] = 0.1,
    max_corrupt_share: CorruptShareOption = 0.01,
    batch_size: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 32,
) -> None:
    """Write the codes of a data set: what a prior is trained on."""
    from isic_vq.data.code_cache import encode_source, write_code_cache
    from isic_vq.data.splits import open_part
    from isic_vq.hub import load_model
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.models.modeling_vqvae import VQVAEModel

    _quiet_transformers()
    records, source = open_part(data, part, validation_share)
    tokenizer = load_model(VQVAEModel, model)
    processor = IsicVQImageProcessor(size=tokenizer.config.image_size)
    cache = encode_source(
        tokenizer, processor, records, source, views, batch_size, max_corrupt_share, progress=True
    )
    write_code_cache(cache, output)
    typer.echo(f"wrote the codes of {len(cache.isic_ids)} images in {views} views to {output}")


@train_app.command(
    "vqvae",
    epilog="Examples:\n\n  isic-vq train vqvae -c examples/configs/vqvae-f8.yaml\n\n"
    "  isic-vq train vqvae -c examples/configs/vqvae-tiny.yaml data.train=folder:my_images loop.max_steps=500",
)
def train_vqvae(
    config: ConfigOption = None, overrides: Overrides = None, resume: ResumeOption = False
) -> None:
    """Train a VQ-VAE tokenizer on images."""
    from isic_vq.training.recipe import VQVAERecipe, load_recipe
    from isic_vq.training.vqvae import train_vqvae as train

    _quiet_transformers()
    recipe = load_recipe(VQVAERecipe, config, overrides or [])
    result = train(recipe, resume)
    if result is None:
        return  # the main process tells
    typer.echo(
        f"{result.psnr:.2f} dB, SSIM {result.ssim:.4f}, {result.usage:.1%} of codes used, perplexity "
        f"{result.perplexity:.0f} on {result.num_images} validation images; wrote {recipe.output_dir}/model"
    )


@train_app.command("prior", epilog="Example:\n\n  isic-vq train prior -c examples/configs/prior-f8.yaml")
def train_prior(
    config: ConfigOption = None, overrides: Overrides = None, resume: ResumeOption = False
) -> None:
    """Train a PixelCNN prior on codes, and join it with its tokenizer."""
    from isic_vq.training.prior import train_prior as train
    from isic_vq.training.recipe import PriorRecipe, load_recipe

    _quiet_transformers()
    recipe = load_recipe(PriorRecipe, config, overrides or [])
    report = train(recipe, resume)
    if report is None:
        return  # the main process tells
    typer.echo(
        f"{report.value('bits_per_code'):.3f} bits per code on validation (unigram "
        f"{report.value('bits_per_code_unigram'):.3f}, flat {report.value('bits_per_code_flat'):.0f}); "
        f"wrote {recipe.output_dir}/model"
    )


@train_app.command(
    "decoder", epilog="Example:\n\n  isic-vq train decoder -c examples/configs/decoder-f8.yaml"
)
def train_decoder(
    config: ConfigOption = None, overrides: Overrides = None, resume: ResumeOption = False
) -> None:
    """Fine-tune a tokenizer's decoder for looks; its codes stay the same."""
    from isic_vq.training.decoder import train_decoder as train
    from isic_vq.training.recipe import DecoderRecipe, load_recipe

    _quiet_transformers()
    recipe = load_recipe(DecoderRecipe, config, overrides or [])
    report = train(recipe, resume)
    if report is None:
        return  # the main process tells
    changes = [
        f"{words} {report.value(name + '_before'):.4g} -> {report.value(name):.4g}"
        for name, words in (
            ("frechet_distance", "Frechet distance"),
            ("feature_distance", "feature distance"),
            ("psnr", "PSNR"),
        )
    ]
    typer.echo(f"{', '.join(changes)} dB on validation; wrote {recipe.output_dir}/model")


@app.command(
    epilog="Example:\n\n  isic-vq evaluate --data folder:test_images --split test --train-codes runs/codes/train.parquet"
)
def evaluate(
    data: DataOption,
    model: ModelOption = None,
    split: Annotated[str, typer.Option(help="What the report calls these images.")] = "validation",
    train_codes: Annotated[
        Path | None, typer.Option(help="Code cache of the training images, for the unigram yardstick.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Report to write.")] = Path("report.json"),
    max_corrupt_share: CorruptShareOption = 0.01,
) -> None:
    """Measure reconstruction, codebook use and, for a whole model, likelihood."""
    from isic_vq.evaluation.evaluate import evaluate_checkpoint

    _quiet_transformers()
    report = evaluate_checkpoint(model, data, split, train_codes, max_corrupt_share)
    report.save(output)
    _print_report(report)
    typer.echo(f"wrote {output}")


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


@app.command(
    epilog="Example:\n\n  isic-vq export runs/prior/model model_cards/my-model --train-codes runs/codes/train.parquet"
)
def export(
    model: Annotated[str, typer.Argument(help="Folder of a whole model.")],
    output: Annotated[Path, typer.Argument(help="Repository folder to write; replaced whole.")],
    train_codes: Annotated[Path, typer.Option(help="Code cache of the training images: their provenance.")],
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Store the prior's parameters in half the space.")
    ] = False,
) -> None:
    """Write a Hub repository folder: weights, processor, previews and provenance."""
    from isic_vq.export import export_repository

    _quiet_transformers()
    export_repository(model, output, train_codes, bf16)
    typer.echo(
        f"wrote {output}; next: isic-vq evaluate -m {output} -o {output}/reports/..., isic-vq card {output}"
    )


@app.command(epilog="Example:\n\n  isic-vq card model_cards/my-model")
def card(folder: Annotated[Path, typer.Argument(help="Repository folder with reports/.")]) -> None:
    """Render the model card of a repository folder from its reports."""
    from isic_vq.export import write_card

    write_card(folder)
    typer.echo(f"wrote {folder / 'README.md'}")


@app.command(epilog="Example:\n\n  isic-vq info model_cards/isic-vq-128")
def info(model: Annotated[str | None, typer.Argument(help="Model folder or Hub id.")] = None) -> None:
    """Describe a model: sizes, classes, licence and measured quality."""
    from isic_vq.evaluation.report import Report
    from isic_vq.hub import load_model, resolve
    from isic_vq.models.modeling_isic_vq import IsicVQModel

    _quiet_transformers()
    loaded = load_model(IsicVQModel, model)
    folder = Path(resolve(model))
    vqvae, prior = loaded.config.vqvae_config, loaded.config.prior_config
    typer.echo(f"isic-vq {__version__}, model {folder.name}")
    typer.echo(
        f"tokenizer: {loaded.vqvae.num_parameters():,} parameters, {vqvae.image_size} px -> "
        f"{vqvae.grid_size}x{vqvae.grid_size} codes of {vqvae.num_codes}"
    )
    typer.echo(f"prior: {prior.model_type}, {loaded.prior.num_parameters():,} parameters")
    typer.echo(
        "classes: " + (", ".join(f"{i} {n}" for i, n in prior.id2label.items()) or "none (unconditional)")
    )
    if (folder / "README.md").is_file():
        from huggingface_hub import ModelCard

        typer.echo(f"weights licence: {ModelCard.load(folder / 'README.md').data.license}")
    for path in sorted(folder.glob("reports/*.json")):
        _print_report(Report.load(path))


def _print_report(report: "Report") -> None:
    """Print a report's metrics as a table."""
    for metric in report.metrics:
        typer.echo(
            f"  {metric.name:<28} {metric.value:>10.5g} {metric.unit:<30} {metric.split}, n = {metric.n}"
        )


def _images(uri: str, processor: Any, max_corrupt_share: float) -> Iterator["torch.Tensor"]:
    """Yield the pixel values of a source, in batches."""
    from isic_vq.data.loading import iter_batches
    from isic_vq.data.sources import open_source

    records = open_source(uri, streaming=True)
    for batch in iter_batches(records, processor, batch_size=32, max_corrupt_share=max_corrupt_share):
        yield batch["pixel_values"]


def _write_png(image: Any, path: Path, about: dict[str, str]) -> None:
    """Write an image or uint8 pixels `(H, W, 3)` as PNG with text fields, whole or not at all."""
    import io

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from isic_vq.files import write_atomically

    fields = PngInfo()
    for key, text in {"Software": f"isic-vq {__version__}", **about}.items():
        fields.add_text(key, text)
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format="PNG", pnginfo=fields)
    write_atomically(path, buffer.getvalue())


def _quiet_transformers() -> None:
    """Hide transformers' loading bars; its warnings stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def main() -> None:
    """Run the command line; errors that a user can act on are printed in one line."""
    try:
        app()
    except (ValueError, OSError, RuntimeError, ImportError, SafetensorError) as error:
        if _debug:
            raise
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
