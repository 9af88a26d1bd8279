"""Commands that measure: checkpoints on data, images under a checkpoint."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isic_vq.cli.app import CorruptShareOption, DataOption, ModelOption, app, check_first, quiet_transformers
from isic_vq.cli.pictures import read_images

if TYPE_CHECKING:
    from isic_vq.evaluation.report import Report


@app.command(
    epilog="Examples:\n\n  isic-vq evaluate --data test=folder:test_images --train-codes runs/codes/train.parquet\n\n"
    "  isic-vq evaluate runs/prior-f8/model --data validation=folder:a --data clinic=folder:b --out report.json\n\n"
    "  isic-vq evaluate --data validation=folder:a --features model_cards/isic-derm-features --floor-data folder:train"
)
def evaluate(
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            help="[NAME=]SOURCE: images, and what the report calls them; repeat it for several. NAME: validation by "
            "default; SOURCE: as for encode.",
        ),
    ],
    model: Annotated[
        str | None, typer.Argument(help="Model folder or Hub id; default: the shipped checkpoint.")
    ] = None,
    train_codes: Annotated[
        Path | None,
        typer.Option(
            help="Code cache of the training images, for the unigram yardstick and their likelihood."
        ),
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option(
            help="Training images, as for --data: how much better they come back, and BatchNorm's gap."
        ),
    ] = None,
    features: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or Hub id of an image model, such as model_cards/isic-derm-features: generate as many images "
            "as the first data set has and compare them by its features; repeat it for several."
        ),
    ] = None,
    floor_data: Annotated[
        str | None,
        typer.Option(
            help="Other real images, as for --data, which --features compares, too: the training images."
        ),
    ] = None,
    lpips: Annotated[
        bool, typer.Option("--lpips", help="Measure LPIPS, too; needs the extra lpips.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--out", "--output", "-o", help="Report to write, and a page and PNGs beside it.")
    ] = Path("report.json"),
    gallery: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the worst reconstructions beside their originals: not to be published where those are not."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of subsets, resampling and generated images.")] = 0,
    max_corrupt_share: CorruptShareOption = 0.01,
) -> None:
    """Measure reconstruction, codebook, likelihood, generated images and cost, with intervals; write a page, too."""
    sets = [_named(text) for text in data]
    sources = [*(uri for _, uri in sets), train_data, floor_data]
    check_first(model, *(features or ()), sources=sources, codes=[train_codes])
    from isic_vq.evaluation.evaluate import evaluate_checkpoint
    from isic_vq.figures.evaluation import write_evaluation_page, write_gallery
    from isic_vq.figures.write import check_matplotlib

    check_matplotlib()
    quiet_transformers()
    evaluation = evaluate_checkpoint(
        model,
        sets,
        train_codes,
        train_data,
        features or [],
        floor_data,
        lpips,
        max_corrupt_share,
        seed,
        progress=sys.stderr.isatty(),
    )
    evaluation.report.save(output)
    print_report(evaluation.report)
    page = write_evaluation_page(evaluation, output.with_suffix(".html"))
    typer.echo(f"wrote {output} and {page}")
    for path in [] if gallery is None else write_gallery(evaluation, gallery):
        typer.echo(f"wrote {path}")


def _named(text: str) -> tuple[str, str]:
    """Parse [NAME=]SOURCE."""
    match = re.match(r"([\w-]+)=(.+)", text, re.DOTALL)
    return (match[1], match[2]) if match else ("validation", text)


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
    check_first(model, sources=[data], codes=[train_codes])
    from tqdm import tqdm

    from isic_vq.evaluation.scores import read_reference, score_images
    from isic_vq.figures.score_plots import Gallery
    from isic_vq.figures.write import check_matplotlib, csv_bytes
    from isic_vq.files import write_atomically
    from isic_vq.hub.pretrained import load_model
    from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
    from isic_vq.models.modeling_isic_vq import IsicVQModel

    if limit:
        check_matplotlib()
    quiet_transformers()
    scorer = load_model(IsicVQModel, model)
    config = scorer.config.vqvae_config
    processor = IsicVQImageProcessor(size=config.image_size)
    class_id = None if label is None else int(scorer.label_ids(label, 1))
    if class_id is None:
        way = "marginal" if marginalize else "unconditional"
    else:
        way = scorer.config.class_names[class_id]
    reference = read_reference(train_codes, scorer, class_id, marginalize) if train_codes else None
    batches, total = read_images(data, processor, max_corrupt_share)
    rows: list[dict[str, Any]] = []
    gallery = Gallery(config.num_codes, limit)
    with tqdm(total=total, unit="image", desc="scoring", disable=not sys.stderr.isatty()) as bar:
        for image in score_images(scorer, batches, class_id, marginalize, reference):
            bits_per_pixel = image.scores["bits_per_code"] * config.num_positions / config.image_size**2
            rows.append({"name": image.name, "label": way, **image.scores, "bits_per_pixel": bits_per_pixel})
            pixels = processor.postprocess(image.pixel_values[None], output_type="np")[0]
            gallery.add(image.name, pixels, image.bits_map.numpy(), image.scores["bits_per_code"])
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
    check_first(model, sources=[data], codes=[train_codes])
    from isic_vq.evaluation.out_of_distribution import evaluate_out_of_distribution
    from isic_vq.figures.score_plots import write_score_histograms
    from isic_vq.figures.write import check_matplotlib

    check_matplotlib()
    quiet_transformers()
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
    print_report(report)
    typer.echo(f"wrote {output} and {output.with_suffix('.png')}")


def print_report(report: "Report") -> None:
    """Print a report's metrics as a table; those of parts of a data set are in the file."""
    shown = [metric for metric in report.metrics if metric.group is None]
    width = max(28, *(len(metric.text) for metric in shown))
    for metric in shown:
        low_high = "" if metric.interval is None else f"[{metric.interval[0]:.5g}, {metric.interval[1]:.5g}]"
        typer.echo(
            f"  {metric.text:<{width}} {metric.value:>10.5g} {low_high:<20} {metric.unit:<30} {metric.split}, "
            f"n = {metric.n}"
        )
