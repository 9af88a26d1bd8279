"""Commands that run studies: many models trained alike, to see what one choice does."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isic_vq.cli.app import (
    ConfigOption,
    CorruptShareOption,
    DataOption,
    ModelOption,
    Overrides,
    app,
    check_first,
    quiet_transformers,
)
from isic_vq.cli.measuring import print_report

if TYPE_CHECKING:
    from isic_vq.evaluation.report import Metric
    from isic_vq.studies.chain import Chain
    from isic_vq.studies.page import StudyPage
    from isic_vq.studies.student import ClassifierStudy

study_app = typer.Typer(help="Train many models alike, to see what one choice does.", no_args_is_help=True)
app.add_typer(study_app, name="study")


ReportOption = Annotated[Path, typer.Option("--out", "--output", "-o", help="Report to write.")]
TrainOption = Annotated[str, typer.Option(help="Real training images, as --data of encode.")]
TestOption = Annotated[
    str, typer.Option(help="Real images to test on, which the model was not trained on either.")
]
WorkOption = Annotated[
    Path, typer.Option(help="Folder of generated images and finished classifiers; a killed run goes on.")
]
LimitOption = Annotated[
    int | None, typer.Option(min=2, help="A quick try on at most so many images of each set.")
]
SplitOption = Annotated[str, typer.Option(help="What the report calls the test images.")]
SeedsOption = Annotated[int, typer.Option(min=2, help="How often each classifier is trained.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Optimizer steps of each classifier.")]


@study_app.command(
    epilog="Example:\n\n  isic-vq study utility --train folder:train_images --test folder:test_images -o utility.json"
)
def utility(
    train: TrainOption,
    test: TestOption,
    model: ModelOption = None,
    output: ReportOption = Path("report.json"),
    work_dir: WorkOption = Path("runs/utility"),
    seeds: SeedsOption = 5,
    steps: StepsOption = 1500,
    limit: LimitOption = None,
    split: SplitOption = "test",
    auc_of: Annotated[
        list[str] | None,
        typer.Option(
            "--auc-of", help="Class whose AUC against all others is reported; repeatable. Default: all."
        ),
    ] = None,
) -> None:
    """Measure what generated images are worth to a classifier: trained on real, generated and both; tested on real."""
    study = _classifier_study(model, train, test, work_dir, seeds, steps, limit, split)
    from isic_vq.studies.utility import evaluate_utility

    _write_classifier_report(model, study, evaluate_utility(study, auc_of=auc_of), limit, output)


@study_app.command(
    epilog="Example:\n\n  isic-vq study realism --train folder:train_images --test folder:test_images -o realism.json"
)
def realism(
    train: TrainOption,
    test: TestOption,
    model: ModelOption = None,
    output: ReportOption = Path("report.json"),
    work_dir: WorkOption = Path("runs/realism"),
    seeds: SeedsOption = 3,
    steps: StepsOption = 600,
    limit: LimitOption = None,
    split: SplitOption = "test",
) -> None:
    """Measure how well a small classifier tells generated images, reconstructions and real images apart."""
    study = _classifier_study(
        model, train, test, work_dir, seeds, steps, limit, split, sees_what_the_model_draws=True
    )
    from isic_vq.studies.realism import evaluate_realism

    _write_classifier_report(model, study, evaluate_realism(study), limit, output)


def _classifier_study(
    model: str | None,
    train: str,
    test: str,
    work_dir: Path,
    seeds: int,
    steps: int,
    limit: int | None,
    split: str,
    sees_what_the_model_draws: bool = False,
) -> "ClassifierStudy":
    check_first(model, sources=[train, test])
    from isic_vq.hub import load_model
    from isic_vq.models.modeling_isic_vq import IsicVQModel
    from isic_vq.studies.realism import default_student
    from isic_vq.studies.student import ClassifierStudy, Student

    quiet_transformers()
    generator = load_model(IsicVQModel, model)
    student = default_student(generator) if sees_what_the_model_draws else Student()
    return ClassifierStudy(
        generator, train, test, work_dir,
        seeds=seeds, student=replace(student, steps=steps), limit=limit, split=split,
    )  # fmt: skip


def _write_classifier_report(
    model: str | None, study: "ClassifierStudy", metrics: list["Metric"], limit: int | None, output: Path
) -> None:
    about = {"classifier": asdict(study.student), "seeds": len(study.seeds), "limit": limit}
    _write_report(model, metrics, output, **about)


@study_app.command(
    epilog="Example:\n\n  isic-vq study sampling --data folder:validation_images --features model_cards/isic-derm-features "
    "--temperature 0.9 --temperature 1 -o sampling.json"
)
def sampling(
    data: DataOption,
    features: Annotated[
        list[str],
        typer.Option(help="Folder or Hub id of an image model, as for evaluate; repeat it for several."),
    ],
    model: ModelOption = None,
    output: ReportOption = Path("report.json"),
    work_dir: Annotated[
        Path, typer.Option(help="Folder of generated images, which are not made again.")
    ] = Path("runs/sampling"),
    temperature: Annotated[
        list[float] | None, typer.Option(help="Repeat it for several; default: 1.")
    ] = None,
    top_p: Annotated[list[float] | None, typer.Option(help="Repeat it for several; default: 1, off.")] = None,
    guidance_scale: Annotated[
        list[float] | None, typer.Option(help="Repeat it for several; default: 1, off.")
    ] = None,
    guidance_power: Annotated[
        list[float] | None,
        typer.Option(help="Of guidance that grows, as for generate; repeat it for several, 0 is off."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the generated images and of resampling.")] = 0,
    split: SplitOption = "validation",
    max_corrupt_share: CorruptShareOption = 0.01,
) -> None:
    """Measure generated images by how their codes are drawn: every temperature with every top-p and guidance."""
    check_first(model, *features, sources=[data])
    from isic_vq.evaluation.generation import Yardstick
    from isic_vq.hub import load_model
    from isic_vq.models.modeling_isic_vq import IsicVQModel
    from isic_vq.studies.sampling import combinations, evaluate_sampling

    quiet_transformers()
    top_ps = [None if value == 1 else value for value in top_p or [1.0]]
    powers = [value or None for value in guidance_power or [0.0]]
    settings = combinations(temperature or [1.0], top_ps, guidance_scale or [1.0], powers)
    generator = load_model(IsicVQModel, model)
    classes = list(generator.config.class_names.values())
    metrics = evaluate_sampling(
        generator,
        [Yardstick.from_pretrained(name, classes) for name in features],
        data,
        settings,
        work_dir,
        split=split,
        seed=seed,
        max_corrupt_share=max_corrupt_share,
        progress=sys.stderr.isatty(),
    )
    _write_report(model, metrics, output, settings=[asdict(setting) for setting in settings])


def _write_report(model: str | None, metrics: list["Metric"], output: Path, **about: Any) -> None:
    """Write the report of a study of one model, and print it."""
    from isic_vq.evaluation.report import Report, environment
    from isic_vq.hub import resolve

    report = Report({"name": Path(resolve(model)).name, **about}, metrics, environment=environment())
    report.save(output)
    print_report(report)
    typer.echo(f"wrote {output}")


SmokeOption = Annotated[
    bool, typer.Option("--smoke", help="Few steps on few images, to see that it runs; marked so everywhere.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--out", "--output", "-o", help="Folder of the results; default: results in output_dir."),
]


@study_app.command(
    epilog="Example:\n\n  isic-vq study granularity -c examples/configs/granularity.yaml --smoke"
)
def granularity(
    config: ConfigOption = None,
    overrides: Overrides = None,
    smoke: SmokeOption = False,
    output: OutputOption = None,
) -> None:
    """How fine should images be quantized? Codebook sizes and grids, by quality and cost; a killed run goes on."""
    from isic_vq.studies.granularity import GranularityRecipe, chains
    from isic_vq.studies.granularity_results import granularity_page

    recipe, output = _recipe(GranularityRecipe, config, overrides, smoke, output)
    _train(list(chains(recipe)))
    _write(granularity_page(recipe, smoke), output)


@study_app.command(
    epilog="Example:\n\n  isic-vq study generalization -c examples/configs/generalization.yaml --smoke"
)
def generalization(
    config: ConfigOption = None,
    overrides: Overrides = None,
    smoke: SmokeOption = False,
    output: OutputOption = None,
) -> None:
    """What happens on images of another source, and does augmentation help? A killed run goes on."""
    from isic_vq.studies.generalization import GeneralizationRecipe, chains, write_domains
    from isic_vq.studies.generalization_results import generalization_page

    recipe, output = _recipe(GeneralizationRecipe, config, overrides, smoke, output)
    write_domains(recipe)
    _train(list(chains(recipe)))
    _write(generalization_page(recipe, smoke), output)


def _recipe(
    recipe_class: type[Any],
    config: Path | None,
    overrides: list[str] | None,
    smoke: bool,
    output: Path | None,
) -> tuple[Any, Path]:
    """The study's recipe and where its results go, which is checked before anything is trained."""
    from isic_vq.figures.write import check_matplotlib
    from isic_vq.studies.page import check_folder
    from isic_vq.studies.smoke import smoke_recipe
    from isic_vq.training.load import load_recipe

    check_matplotlib()
    quiet_transformers()
    recipe = load_recipe(recipe_class, config, overrides or [])
    if smoke:
        recipe = smoke_recipe(recipe)
    output = output or Path(recipe.output_dir, "results")
    check_folder(output, smoke)
    return recipe, output


def _train(chains: list["Chain"]) -> None:
    """Train the models that are not trained yet, one after the other."""
    for number, chain in enumerate(chains, 1):
        if not chain.is_finished:
            typer.echo(f"model {number} of {len(chains)}: {chain.folder.name}")
            chain.run()


def _write(page: "StudyPage", output: Path) -> None:
    for path in page.write(output):
        typer.echo(f"wrote {path}")
    for finding in page.findings:
        typer.echo(f"- {finding}")
