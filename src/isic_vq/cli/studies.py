"""Commands that run studies: many models trained alike, to see what one choice does."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isic_vq.cli.app import (
    ModelOption,
    app,
    check_first,
    quiet_transformers,
)
from isic_vq.cli.measuring import print_report

if TYPE_CHECKING:
    from isic_vq.evaluation.report import Metric
    from isic_vq.evaluation.student import ClassifierStudy

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
    from isic_vq.evaluation.utility import evaluate_utility

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
    from isic_vq.evaluation.realism import evaluate_realism

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
    from isic_vq.evaluation.realism import default_student
    from isic_vq.evaluation.student import ClassifierStudy, Student
    from isic_vq.hub.pretrained import load_model
    from isic_vq.models.modeling_isic_vq import IsicVQModel

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


def _write_report(model: str | None, metrics: list["Metric"], output: Path, **about: Any) -> None:
    """Write the report of a study of one model, and print it."""
    from isic_vq.evaluation.report import Report, environment
    from isic_vq.hub.pretrained import resolve

    report = Report({"name": Path(resolve(model)).name, **about}, metrics, environment=environment())
    report.save(output)
    print_report(report)
    typer.echo(f"wrote {output}")
