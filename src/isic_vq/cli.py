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
        str, typer.Option(help="eager, compiled (needs numba), cuda_graph, or auto for the fastest.")
    ] = "auto",
    temperature: Annotated[float, typer.Option(help="Below 1: safer, above 1: wilder.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep this many most likely codes.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the codes that hold this much probability.")
    ] = None,
    guidance_scale: Annotated[float, typer.Option(help="1 is off; larger follows the label more.")] = 1.0,
    shards: Annotated[
        str | None, typer.Option(help="Write parquet or webdataset shards: for large sets.")
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Images per shard: a multiple of --batch-size.")] = 1024,
) -> None:
    """Generate images and write them as PNGs, with one grid of all of them, or as shards of a large set.

    With --shards it may run in many processes (torchrun, accelerate launch), and goes on where it was interrupted.
    """
    from isic_vq.figures import image_grid
    from isic_vq.hub import load_model, resolve
    from isic_vq.models.modeling_isic_vq import IsicVQModel
    from isic_vq.models.pipeline_isic_vq import UnconditionalImageGenerationPipeline

    _quiet_transformers()
    if shards is not None:
        from isic_vq.generation import generate_shards, launched_process

        rank, world = launched_process()
        made, kept = generate_shards(
            load_model(IsicVQModel, model),
            output,
            num_images,
            label or None,
            seed=seed,
            format=shards,
            images_per_shard=shard_size,
            block_size=batch_size,
            backend=backend,
            rank=rank,
            world=world,
            progress=True,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance_scale=guidance_scale,
        )
        typer.echo(f"process {rank} of {world}: wrote {made} shards to {output}, {kept} were there")
        return
    pipe = UnconditionalImageGenerationPipeline(load_model(IsicVQModel, model))
    result = pipe(
        label if label and len(label) > 1 else (label[0] if label else None),
        num_images=num_images,
        seed=seed,
        batch_size=batch_size,
        backend=backend,
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
        int, typer.Option("--num-images", "-n", min=1, help="How many variants to draw.")
    ] = 4,
    particles: Annotated[
        int, typer.Option(help="Candidates per variant; more fit the rest of the image better.")
    ] = 64,
    seed: Annotated[int, typer.Option(help="Variant i depends on (seed, i) alone.")] = 0,
    dilation: Annotated[int, typer.Option(help="Codes by which the mask grows on all sides.")] = 0,
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the PNGs.")] = Path("edited"),
) -> None:
    """Draw a part of an image anew so that it fits the rest, in several variants."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from isic_vq.figures import image_grid
    from isic_vq.hub import load_model, resolve
    from isic_vq.models.editing import pixel_mask
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.models.modeling_isic_vq import IsicVQModel

    _quiet_transformers()
    editor = load_model(IsicVQModel, model)
    config = editor.config
    processor = IsicVQImageProcessor(size=config.vqvae_config.image_size)
    marked = _marked_pixels(processor, image, mask, box, lower_half)
    original = processor(image, return_tensors="pt")["pixel_values"].to(editor.device)
    rows = num_images * config.prior_config.grid_size
    with tqdm(total=rows, disable=not sys.stderr.isatty(), unit="row", desc="editing") as bar:
        edited: Any = editor.inpaint(
            original.expand(num_images, -1, -1, -1),
            marked,
            label,
            num_particles=particles,
            seed=seed,
            dilation=dilation,
            on_row=bar.update,
        )
    blue = torch.tensor([0.1, 0.4, 1.0], device=editor.device)[:, None, None]
    redrawn = pixel_mask(edited.mask[:1], config.vqvae_config.downsampling)
    shown = torch.where(redrawn, (original + blue) / 2, original)
    before = processor.postprocess(torch.cat([original, shown]), output_type="np")
    after = processor.postprocess(edited.pixel_values, output_type="np")
    classes = {**config.class_names, editor.prior.config.unconditional_id: "unconditional"}
    title = classes[edited.labels[0].item()]
    about = {"Title": title, "Source": Path(resolve(model)).name}
    for index, pixels in enumerate(after):
        comment = f"edited image, seed {seed}, index {index}"
        _write_png(pixels, output / f"image-{index:05d}.png", {**about, "Comment": comment})
    names = ["original", "drawn anew", *(f"{title} {index}" for index in range(num_images))]
    about["Comment"] = f"an image and its edits, seed {seed}"
    _write_png(image_grid(np.concatenate([before, after]), labels=names), output / "grid.png", about)
    if edited.num_particles[0] < particles:
        typer.echo("exact with one particle: nothing is kept after the first code drawn anew")
    else:
        for index, ess in enumerate(edited.ess):
            typer.echo(
                f"variant {index}: effective sample size {ess[-1]:.1f} of {particles} particles at the end, "
                f"{ess.min():.1f} in the poorest row"
            )
    typer.echo(f"wrote {num_images} variants and {output / 'grid.png'}")


@app.command(
    epilog="Examples:\n\n  isic-vq score my_images/\n\n  isic-vq score photo.jpg --marginalize -o out/"
)
def score(
    data: Annotated[str, typer.Argument(help="Image file, folder, or a URI as for --data.")],
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the table and the PNGs.")] = Path(
        "scores"
    ),
    label: Annotated[
        str | None,
        typer.Option("--label", "-l", help="Diagnosis (name, alias or id) to score all images as."),
    ] = None,
    marginalize: Annotated[
        bool, typer.Option("--marginalize", help="Score under all diagnoses together, weighed alike.")
    ] = False,
    limit: Annotated[
        int, typer.Option(min=0, help="Heat maps of the first so many images; 0 writes the table alone.")
    ] = 16,
    train_codes: Annotated[
        Path | None, typer.Option(help="Code cache of the training images, for two more scores.")
    ] = None,
    max_corrupt_share: CorruptShareOption = 0.01,
) -> None:
    """Measure how likely the prior finds images, and map where they surprise it."""
    from tqdm import tqdm

    from isic_vq.evaluation.scores import read_reference, score_images
    from isic_vq.figures.scores import Gallery
    from isic_vq.figures.write import check_matplotlib, csv_bytes
    from isic_vq.files import write_atomically
    from isic_vq.hub import load_model
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.models.modeling_isic_vq import IsicVQModel

    if limit:
        check_matplotlib()
    _quiet_transformers()
    scorer = load_model(IsicVQModel, model)
    config = scorer.config.vqvae_config
    processor = IsicVQImageProcessor(size=config.image_size)
    class_id = None if label is None else int(scorer.label_ids(label, 1))
    if class_id is None:
        way = "marginal" if marginalize else "unconditional"
    else:
        way = scorer.config.class_names[class_id]
    reference = read_reference(train_codes, scorer, class_id, marginalize) if train_codes else None
    batches, total = _named_images(data, processor, max_corrupt_share)
    rows: list[dict[str, Any]] = []
    gallery = Gallery(config.num_codes, limit)
    with tqdm(total=total, unit="image", desc="scoring", disable=not sys.stderr.isatty()) as bar:
        for image in score_images(scorer, batches, class_id, marginalize, reference):
            bits_per_pixel = image.scores["bits_per_code"] / config.downsampling**2
            rows.append({"name": image.name, "label": way, **image.scores, "bits_per_pixel": bits_per_pixel})
            pixels = processor.postprocess(image.pixel_values[None], output_type="np")[0]
            gallery.add(image.name, pixels, image.bits.numpy())
            bar.update()
    if not rows:
        raise ValueError(f"{data} holds no readable image")
    write_atomically(output / "scores.csv", csv_bytes({key: [row[key] for row in rows] for key in rows[0]}))
    gallery.write(output)
    bits = [row["bits_per_code"] for row in rows]
    typer.echo(
        f"{len(rows)} images: {sum(bits) / len(bits):.3f} bits per code ({way}), from {min(bits):.3f} to "
        f"{max(bits):.3f}; wrote {output / 'scores.csv'}"
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


@app.command(
    epilog="Example:\n\n  isic-vq ood --data folder:test_images --split test --train-codes runs/codes/train.parquet"
)
def ood(
    data: DataOption,
    train_codes: Annotated[Path, typer.Option(help="Code cache of the training images.")],
    model: ModelOption = None,
    non_skin: Annotated[
        str | None,
        typer.Option(help="Images that show no skin, as for --data; default: photographs of scikit-learn."),
    ] = None,
    split: Annotated[str, typer.Option(help="What the report calls these images.")] = "validation",
    limit: Annotated[int, typer.Option(min=1, help="At most this many images, a seeded subset.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of the subset and of what spoils the images.")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Report to write, and histograms as PNG beside it.")
    ] = Path("report.json"),
    max_corrupt_share: CorruptShareOption = 0.01,
) -> None:
    """Measure how well likelihood scores tell images from spoiled ones and from other photographs."""
    from isic_vq.evaluation.out_of_distribution import evaluate_out_of_distribution
    from isic_vq.figures.scores import write_score_histograms
    from isic_vq.figures.write import check_matplotlib

    check_matplotlib()
    _quiet_transformers()
    report = evaluate_out_of_distribution(
        model,
        data,
        train_codes,
        split,
        non_skin,
        limit,
        seed,
        max_corrupt_share,
        progress=sys.stderr.isatty(),
    )
    report.save(output)
    write_score_histograms(report, output.with_suffix(".png"))
    _print_report(report)
    typer.echo(f"wrote {output} and {output.with_suffix('.png')}")


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
    width = max(28, *(len(metric.name) for metric in report.metrics))
    for metric in report.metrics:
        typer.echo(
            f"  {metric.name:<{width}} {metric.value:>10.5g} {metric.unit:<30} {metric.split}, n = {metric.n}"
        )


def _images(uri: str, processor: Any, max_corrupt_share: float) -> Iterator["torch.Tensor"]:
    """Yield the pixel values of a source, in batches."""
    from isic_vq.data.loading import iter_batches
    from isic_vq.data.sources import open_source

    records = open_source(uri, streaming=True)
    for batch in iter_batches(records, processor, batch_size=32, max_corrupt_share=max_corrupt_share):
        yield batch["pixel_values"]


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


def _named_images(
    data: str, processor: Any, max_corrupt_share: float
) -> tuple[Iterator[tuple[list[str], "torch.Tensor"]], int]:
    """Names and pixel values of a source or of one image file, in batches, and how many images there are."""
    from isic_vq.data.loading import iter_batches
    from isic_vq.data.sources import open_source

    if Path(data).is_file() and not data.endswith(".parquet"):
        return iter([([Path(data).name], processor(data, return_tensors="pt")["pixel_values"])]), 1
    records = open_source(data)
    batches = iter_batches(records, processor, batch_size=32, max_corrupt_share=max_corrupt_share)
    return ((batch["isic_ids"], batch["pixel_values"]) for batch in batches), len(records)


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
