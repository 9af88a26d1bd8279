"""Commands that judge a model: what it measures on images, and whether it repeats its training images."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from isic_vq.cli.app import DeviceOption, ModelOption, app, check_first, open_model, quiet_transformers
from isic_vq.cli.flags import options_of
from isic_vq.data.uri import set_name

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
    "utility": ("train_data", "work_dir", "seeds", "sizes", "ratios", "positive", "planted", "smoke"),
    "sheets": ("particles", "seed", "max_corrupt_share"),
}


@app.command(
    epilog="Examples:\n\n  isic-vq evaluate --data test=folder:test_images --train-codes runs/codes/train.parquet\n\n"
    "  isic-vq evaluate runs/prior-f8/model --data validation=folder:a --data clinic=folder:b --out report.json\n\n"
    "  isic-vq evaluate --data validation=folder:a --features model_cards/isic-derm-features --floor-data folder:train\n\n"
    "  isic-vq evaluate --only utility --train-data folder:train --data test=folder:test -o utility.json\n\n"
    "  isic-vq evaluate --only sheets -o sheets"
)
@options_of("figures/sheets.py:write_sheets", "particles", "With --only sheets")
@options_of(
    "evaluation/utility.py:utility_report",
    "sizes ratios positive planted smoke",
    "With --only utility",
    sizes="size",
    ratios="ratio",
)
@options_of(
    "evaluation/realism.py:realism_report",
    "work_dir seeds steps limit",
    "With --only realism (work-dir and seeds: utility, too; limit: ood, too)",
)
@options_of("evaluation/out_of_distribution.py:evaluate_out_of_distribution", "non_skin", "With --only ood")
@options_of(
    "evaluation/evaluate.py:evaluate_checkpoint",
    "train_codes train_data features floor_data lpips seed max_corrupt_share",
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
            help="[NAME=]SOURCE: images, and what the report calls them; repeat it for several. NAME: by "
            "default the split, folder or file of SOURCE, which is as for encode. Of sheets: real images, shown beside generated ones instead of other sheets.",
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
            help="Folder for the worst reconstructions beside their originals: keep it private if the images are."
        ),
    ] = None,
    device: DeviceOption = None,
    **settings: Any,
) -> None:
    """Measure reconstruction, codebook, likelihood, generated images and cost, with intervals; write a page, too."""
    _check_options(context, only)
    sets = [_named(text) for text in data or []]
    train_codes, train_data = settings.get("train_codes"), settings.get("train_data")
    sources = [*(uri for _, uri in sets), train_data, settings.get("floor_data"), settings.get("non_skin")]
    check_first(
        model, *settings.get("features", ()), sources=sources, codes=[train_codes], seed=settings["seed"],
        file=None if only == "sheets" else output,
    )  # fmt: skip
    what = "evaluate" if only is None else f"evaluate --only {only}"
    names = [name for name, _ in sets]
    if len(set(names)) < len(names):
        raise ValueError(
            f"data sets are called {', '.join(names)}: name each differently, --data NAME=SOURCE"
        )
    if not sets and only != "sheets":
        raise ValueError(f"{what} needs --data")
    if only not in (None, "utility") and len(sets) > 1:
        raise ValueError(f"{what} takes one --data, got {len(sets)}")
    if train_codes is None and only == "ood":
        raise ValueError(f"{what} needs --train-codes")
    if train_data is None and only in ("realism", "utility"):
        raise ValueError(f"{what} needs --train-data")
    quiet_transformers()
    settings = {name: value for name, value in settings.items() if name in OPTIONS[only]}
    output = output or Path("sheets" if only == "sheets" else "report.json")
    if only == "sheets":
        _write_sheets(model, sets[0][1] if sets else None, output, device, settings)
    else:
        _write_measured(only, model, sets, output, gallery, {**settings, "device": device})


def _write_sheets(
    model: str | None, data: str | None, output: Path, device: str | None, settings: dict[str, Any]
) -> None:
    from isic_vq.figures.sheets import write_sheets

    artist = open_model(model, device)
    for path, caption in write_sheets(artist, output, data, progress=sys.stderr.isatty(), **settings):
        typer.echo(f"wrote {path}: {caption}")


def _write_measured(
    only: str | None,
    model: str | None,
    sets: list[tuple[str, str]],
    output: Path,
    gallery: Path | None,
    settings: dict[str, Any],
) -> None:
    """Measure, write the report and what is drawn of it, and print it."""
    from isic_vq.evaluation.evaluate import evaluate_checkpoint
    from isic_vq.evaluation.out_of_distribution import evaluate_out_of_distribution
    from isic_vq.evaluation.realism import realism_report
    from isic_vq.evaluation.report_tables import report_lines
    from isic_vq.evaluation.utility import utility_report
    from isic_vq.figures.evaluation import write_evaluation_page, write_gallery
    from isic_vq.figures.gain_curves import write_gain_curves
    from isic_vq.figures.score_plots import write_score_histograms
    from isic_vq.figures.write import check_matplotlib

    if only in (None, "ood", "utility"):
        check_matplotlib()
    (split, data), progress, paths = sets[0], sys.stderr.isatty(), []
    if only is None:
        evaluation = evaluate_checkpoint(model, sets, progress=progress, **settings)
        report = evaluation.report
    elif only == "ood":
        report = evaluate_out_of_distribution(model, data, split=split, progress=progress, **settings)
    elif only == "utility":
        report = utility_report(model, settings.pop("train_data"), dict(sets), **settings)
    else:
        report = realism_report(model, settings.pop("train_data"), data, split=split, **settings)
    report.save(output)
    for line in report_lines(report):
        typer.echo(line)
    if only is None:
        paths = [write_evaluation_page(evaluation, output.with_suffix(".html"))]
        paths += [] if gallery is None else write_gallery(evaluation, gallery)
    elif only == "ood":
        write_score_histograms(report, output.with_suffix(".png"))
        paths = [output.with_suffix(".png")]
    elif only == "utility":
        paths = write_gain_curves(report, output)
    for path in (output, *paths):
        typer.echo(f"wrote {path}")
    _name_next(output)


def _name_next(report: Path) -> None:
    """Of a report in a repository folder: the command that puts it into the card."""
    folder = report.absolute().parent.parent
    if report.absolute().parent.name == "reports" and (folder / "provenance.json").is_file():
        typer.echo(f"next: isic-vq card {report.parent.parent}")


def _named(text: str) -> tuple[str, str]:
    match = re.match(r"([\w-]+)=(.+)", text, re.DOTALL)
    return (match[1], match[2]) if match else (set_name(text), text)


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


@app.command(
    epilog="Examples:\n\n  isic-vq audit --train-codes runs/codes/train.parquet --held-out-codes "
    "runs/codes/validation.parquet --features models/derm-features\n\n  isic-vq audit --train-codes train.parquet "
    "--held-out-codes validation.parquet --samples-from folder:theirs"
)
@options_of(
    "evaluation/audit.py:audit_checkpoint",
    "features num_samples samples_from seed limit max_corrupt_share",
    num_samples="samples",
)
def audit(
    train_codes: Annotated[
        Path, typer.Option(help="Code cache of the training images, best in all eight views.")
    ],
    held_out_codes: Annotated[
        Path, typer.Option(help="Code cache of images of the same origin that are new to the model.")
    ],
    model: ModelOption = None,
    train_images: Annotated[
        str | None,
        typer.Option(
            help="The training images, to be shown in pairs; without it, what their codes decode to."
        ),
    ] = None,
    pairs: Annotated[
        Path,
        typer.Option(help="Folder for pictures of the closest pairs: they may show patients' images."),
    ] = Path("runs/audit/pairs"),
    output: Annotated[Path, typer.Option("--out", "--output", "-o", help="Report to write.")] = Path(
        "runs/audit/report.json"
    ),
    device: DeviceOption = None,
    **settings: Any,
) -> None:
    """Tell whether samples are nearer to training images than new images are, and show the closest pairs."""
    check_first(
        model, *settings.get("features", ()), codes=[train_codes, held_out_codes], seed=settings["seed"],
        file=output, folder=pairs,
    )  # fmt: skip
    from isic_vq.evaluation.audit import audit_checkpoint
    from isic_vq.evaluation.report_tables import report_lines
    from isic_vq.figures.evaluation import write_pairs

    quiet_transformers()
    result = audit_checkpoint(
        model, train_codes, held_out_codes, progress=sys.stderr.isatty(), device=device, **settings
    )
    result.report.save(output)
    for line in report_lines(result.report):
        typer.echo(line)
    for path in (*write_pairs(result, pairs, train_images), output):
        typer.echo(f"wrote {path}")
    typer.echo(result.report.tables["verdict"])
    _name_next(output)
