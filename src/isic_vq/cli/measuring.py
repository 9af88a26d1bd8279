"""Commands that measure: checkpoints on data, images under a checkpoint."""

import re
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from isic_vq.cli.app import CorruptShareOption, ModelOption, app, check_first, quiet_transformers
from isic_vq.cli.pictures import read_images

if TYPE_CHECKING:
    from isic_vq.evaluation.report import Report


# What evaluate measures with --only, and the options that each takes; None is the usual evaluation.
OPTIONS = {
    None: (
        "train_codes",
        "train_data",
        "features",
        "floor_data",
        "lpips",
        "gallery",
        "seed",
        "max_corrupt_share",
    ),
    "ood": ("train_codes", "non_skin", "limit", "seed", "max_corrupt_share"),
    "realism": ("train_data", "work_dir", "seeds", "steps", "limit"),
    "utility": ("train_data", "work_dir", "seeds", "steps", "limit", "auc_of"),
    "sheets": ("particles", "seed", "max_corrupt_share"),
}


@app.command(
    epilog="Examples:\n\n  isic-vq evaluate --data test=folder:test_images --train-codes runs/codes/train.parquet\n\n"
    "  isic-vq evaluate runs/prior-f8/model --data validation=folder:a --data clinic=folder:b --out report.json\n\n"
    "  isic-vq evaluate --data validation=folder:a --features model_cards/isic-derm-features --floor-data folder:train\n\n"
    "  isic-vq evaluate --only utility --train-data folder:train --data test=folder:test -o utility.json\n\n"
    "  isic-vq evaluate --only sheets -o sheets"
)
def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Model folder or Hub id; default: the shipped checkpoint.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="[NAME=]SOURCE: images, and what the report calls them; repeat it for several. NAME: validation by "
            "default; SOURCE: as for encode. Of sheets: real images, shown beside generated ones instead of other sheets.",
        ),
    ] = None,
    only: Annotated[
        Literal["ood", "realism", "utility", "sheets"] | None,
        typer.Option(
            help="Measure this instead: how well likelihood finds unusual images (ood); how well a classifier tells "
            "generated images from real ones (realism); what they are worth to one that is trained on them (utility). Or "
            "draw sheets to judge a model by: every class, mixtures, completions, counterfactuals, codes."
        ),
    ] = None,
    train_codes: Annotated[
        Path | None,
        typer.Option(
            help="Code cache of the training images, for the unigram yardstick and their likelihood; ood needs it."
        ),
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option(
            help="Training images, as for --data: how much better they come back, and BatchNorm's gap; realism and "
            "utility need it."
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
        Path | None,
        typer.Option(
            "--out",
            "--output",
            "-o",
            help="Report to write (default report.json), and a page and PNGs beside it; of sheets: their folder.",
        ),
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the worst reconstructions beside their originals: not to be published where those are not."
        ),
    ] = None,
    non_skin: Annotated[
        str | None,
        typer.Option(
            help="ood: images that show no skin, as for --data; default: photographs of scikit-learn."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="ood: at most so many images, 300 by default; realism, utility: of each set, a quick try.",
        ),
    ] = None,
    work_dir: Annotated[
        Path | None,
        typer.Option(
            help="realism, utility: folder of generated images and finished classifiers, so that a killed run goes on; "
            "default: runs/realism, runs/utility."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=2, help="realism, utility: how often each classifier is trained; 3, 5.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="realism, utility: optimizer steps of each classifier; 600, 1500."),
    ] = None,
    auc_of: Annotated[
        list[str] | None,
        typer.Option(
            "--auc-of",
            help="utility: class whose AUC against all others is reported; repeatable. Default: all.",
        ),
    ] = None,
    particles: Annotated[
        int,
        typer.Option(max=4096, help="sheets: candidates per edit; more fit the rest of the image better."),
    ] = 64,
    seed: Annotated[
        int, typer.Option(min=0, help="Of subsets, resampling, spoiled and generated images.")
    ] = 0,
    max_corrupt_share: CorruptShareOption = 0.01,
) -> None:
    """Measure reconstruction, codebook, likelihood, generated images and cost, with intervals; write a page, too."""
    _check_options(context, only)
    sets = [_named(text) for text in data or []]
    sources = [*(uri for _, uri in sets), train_data, floor_data, non_skin]
    check_first(model, *(features or ()), sources=sources, codes=[train_codes])
    what = "evaluate" if only is None else f"evaluate --only {only}"
    if not sets and only != "sheets":
        raise ValueError(f"{what} needs --data")
    if train_codes is None and only == "ood":
        raise ValueError(f"{what} needs --train-codes")
    if train_data is None and only in ("realism", "utility"):
        raise ValueError(f"{what} needs --train-data")
    if only is not None and len(sets) > 1:
        raise ValueError(f"{what} takes one --data, got {len(sets)}")
    quiet_transformers()
    if only == "sheets":
        uri = sets[0][1] if sets else None
        return _draw_sheets(model, uri, output or Path("sheets"), seed, particles, max_corrupt_share)
    output = output or Path("report.json")
    if only == "ood" and train_codes is not None:
        return _evaluate_ood(
            model, sets[0], train_codes, non_skin, limit or 300, seed, max_corrupt_share, output
        )
    if only is not None and train_data is not None:
        return _train_classifiers(
            only, model, train_data, sets[0], work_dir, seeds, steps, limit, auc_of, output
        )
    from isic_vq.evaluation.evaluate import evaluate_checkpoint
    from isic_vq.figures.evaluation import write_evaluation_page, write_gallery
    from isic_vq.figures.write import check_matplotlib

    check_matplotlib()
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
    return None


def _named(text: str) -> tuple[str, str]:
    """Parse [NAME=]SOURCE."""
    match = re.match(r"([\w-]+)=(.+)", text, re.DOTALL)
    return (match[1], match[2]) if match else ("validation", text)


def _check_options(context: typer.Context, only: str | None) -> None:
    """Refuse options that what is measured does not take."""
    for name in context.params:
        owners = [str(owner or "the usual evaluation") for owner, names in OPTIONS.items() if name in names]
        source = context.get_parameter_source(name)
        given = source is not None and source.name == "COMMANDLINE"
        if given and owners and name not in OPTIONS[only]:
            what = "without --only" if only is None else f"with --only {only}"
            raise ValueError(
                f"--{name.replace('_', '-')} means nothing {what}: it is for {', '.join(owners)}"
            )


def _draw_sheets(
    model: str | None, data: str | None, output: Path, seed: int, particles: int, max_corrupt_share: float
) -> None:
    from tqdm import tqdm

    from isic_vq.data.classes import Classes
    from isic_vq.data.sources import find_source
    from isic_vq.figures.png import write_jpeg
    from isic_vq.figures.sheets import model_sheets, real_sheets
    from isic_vq.files import file_name
    from isic_vq.hub.pretrained import load_model
    from isic_vq.models.modeling_isic_vq import IsicVQModel

    artist = load_model(IsicVQModel, model)
    if data is None:
        made = model_sheets(artist, seed, particles)
    else:
        classes = Classes.of_model(artist.config.class_names.values())
        made = real_sheets(artist, find_source(data, classes), seed, max_corrupt_share)
    for sheet in tqdm(made, unit="sheet", disable=not sys.stderr.isatty()):
        path = output / f"{file_name(sheet.name)}.jpg"
        write_jpeg(sheet.picture, path, sheet.caption)
        tqdm.write(f"wrote {path}: {sheet.caption}")


def _evaluate_ood(
    model: str | None,
    named: tuple[str, str],
    train_codes: Path,
    non_skin: str | None,
    limit: int,
    seed: int,
    max_corrupt_share: float,
    output: Path,
) -> None:
    from isic_vq.evaluation.out_of_distribution import evaluate_out_of_distribution
    from isic_vq.figures.score_plots import write_score_histograms
    from isic_vq.figures.write import check_matplotlib

    check_matplotlib()
    split, data = named
    report = evaluate_out_of_distribution(
        model, data, train_codes, split, non_skin, limit, seed, max_corrupt_share, sys.stderr.isatty()
    )  # fmt: skip
    report.save(output)
    write_score_histograms(report, output.with_suffix(".png"))
    print_report(report)
    typer.echo(f"wrote {output} and {output.with_suffix('.png')}")


def _train_classifiers(
    only: str,
    model: str | None,
    train: str,
    named: tuple[str, str],
    work_dir: Path | None,
    seeds: int | None,
    steps: int | None,
    limit: int | None,
    auc_of: list[str] | None,
    output: Path,
) -> None:
    from isic_vq.evaluation.realism import default_student, evaluate_realism
    from isic_vq.evaluation.report import Report, environment
    from isic_vq.evaluation.student import ClassifierStudy, Student
    from isic_vq.evaluation.utility import evaluate_utility
    from isic_vq.hub.pretrained import load_model, resolve
    from isic_vq.models.modeling_isic_vq import IsicVQModel

    generator = load_model(IsicVQModel, model)
    student, usual_seeds = (Student(), 5) if only == "utility" else (default_student(generator), 3)
    if steps is not None:
        student = replace(student, steps=steps)
    split, test = named
    study = ClassifierStudy(
        generator, train, test, work_dir or Path("runs", only),
        seeds=seeds or usual_seeds, student=student, limit=limit, split=split,
    )  # fmt: skip
    metrics = evaluate_utility(study, auc_of=auc_of) if only == "utility" else evaluate_realism(study)
    about = {"classifier": asdict(student), "seeds": len(study.seeds), "limit": limit}
    report = Report({"name": Path(resolve(model)).name, **about}, metrics, environment=environment())
    report.save(output)
    print_report(report)
    typer.echo(f"wrote {output}")


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
