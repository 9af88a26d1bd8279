"""Commands that run studies: many models trained alike, to see what one choice does."""

from pathlib import Path
from typing import Annotated

import typer

from isic_vq.cli.app import ModelOption, app, quiet_transformers
from isic_vq.cli.measuring import print_report

study_app = typer.Typer(help="Train many models alike, to see what one choice does.", no_args_is_help=True)
app.add_typer(study_app, name="study")


@study_app.callback()
def _studies() -> None:
    """A group, however few commands it has."""


@study_app.command(
    epilog="Example:\n\n  isic-vq study utility --train folder:train_images --test folder:test_images -o utility.json"
)
def utility(
    train: Annotated[str, typer.Option(help="Real training images, as --data of encode.")],
    test: Annotated[
        str, typer.Option(help="Real images to test on, which the model was not trained on either.")
    ],
    model: ModelOption = None,
    output: Annotated[Path, typer.Option("--out", "--output", "-o", help="Report to write.")] = Path(
        "report.json"
    ),
    work_dir: Annotated[
        Path, typer.Option(help="Folder of generated images and finished classifiers; a killed run goes on.")
    ] = Path("runs/utility"),
    seeds: Annotated[int, typer.Option(min=2, help="How often each classifier is trained.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each classifier.")] = 1500,
    limit: Annotated[
        int | None, typer.Option(min=2, help="A quick try on at most so many images of each set.")
    ] = None,
    split: Annotated[str, typer.Option(help="What the report calls the test images.")] = "test",
) -> None:
    """Measure what generated images are worth to a classifier: trained on real, generated and both; tested on real."""
    from dataclasses import asdict

    from isic_vq.evaluation.report import Report, environment
    from isic_vq.hub import load_model, resolve
    from isic_vq.models.modeling_isic_vq import IsicVQModel
    from isic_vq.studies.utility import Student, evaluate_utility

    quiet_transformers()
    student = Student(steps=steps)
    generator = load_model(IsicVQModel, model)
    metrics = evaluate_utility(
        generator, train, test, work_dir, seeds=seeds, student=student, limit=limit, split=split
    )
    about = {"name": Path(resolve(model)).name, "classifier": asdict(student), "seeds": seeds, "limit": limit}
    report = Report(about, metrics, environment=environment())
    report.save(output)
    print_report(report)
    typer.echo(f"wrote {output}")
