"""Commands around a model's repository folder: export, card, description."""

from pathlib import Path
from typing import Annotated

import typer

from isic_vq import __version__
from isic_vq.cli.app import ModelOption, app, quiet_transformers
from isic_vq.cli.measuring import print_report

card_app = typer.Typer(help="Write and check a model's card.", no_args_is_help=True)
app.add_typer(card_app, name="card")

RepositoryFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Repository folder, as export leaves it, with reports/.")
]


@app.command(
    epilog="Example:\n\n  isic-vq export runs/prior/model model_cards/my-model --train-codes runs/codes/train.parquet"
)
def export(
    model: Annotated[str, typer.Argument(help="Folder of a whole model.")],
    output: Annotated[Path, typer.Argument(help="Repository folder to write; replaced whole.")],
    train_codes: Annotated[Path, typer.Option(help="Code cache of the training images: their provenance.")],
    bf16: Annotated[
        bool,
        typer.Option(
            "--bf16", help="Store the prior and the decoder in half the space; codes stay the same."
        ),
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Add the tokenizer as ONNX files; isic-vq onnx writes them alone.")
    ] = False,
) -> None:
    """Write a Hub repository folder: weights, processor, previews and provenance."""
    from isic_vq.hub.export import export_repository

    quiet_transformers()
    export_repository(model, output, train_codes, bf16, onnx)
    typer.echo(
        f"wrote {output}; next: isic-vq evaluate {output} --data ... -o {output}/reports/..., isic-vq card write {output}"
    )


@app.command(
    epilog="Examples:\n\n  isic-vq onnx -o deployment\n\n  isic-vq onnx -m model_cards/my-model -o model_cards/my-model"
)
def onnx(
    model: ModelOption = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder that gets onnx/; what else it holds stays.")
    ] = Path("."),
) -> None:
    """Write the tokenizer as ONNX files, for programs without torch: onnx/encoder.onnx and onnx/decoder.onnx.

    They are written once ONNX Runtime computes with them what torch does. Needs the extra onnx.
    """
    from isic_vq.hub.onnx_export import export_onnx, known_license
    from isic_vq.hub.pretrained import load_model
    from isic_vq.models.modeling_vqvae import VQVAEModel

    quiet_transformers()
    paths = export_onnx(load_model(VQVAEModel, model), output, known_license(model))
    typer.echo(f"wrote {' and '.join(map(str, paths))}")


@card_app.command(epilog="Example:\n\n  isic-vq card write model_cards/my-model")
def write(folder: RepositoryFolder) -> None:
    """Render the model card of a repository folder from its reports and its provenance."""
    from isic_vq.hub.card import write_card

    write_card(folder)
    typer.echo(f"wrote {folder / 'README.md'}; next: isic-vq card check {folder}")


@card_app.command(epilog="Example:\n\n  isic-vq card check model_cards/isic-vq-128")
def check(folder: RepositoryFolder) -> None:
    """Compare a model card with the reports: metadata, every number, links and pictures.

    Prints a line for each problem, and then exits with 1. Prose without numbers is yours to write.
    """
    from isic_vq.hub.card_check import check_card

    problems = check_card(folder)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{folder / 'README.md'} says what the reports say")


@card_app.command(epilog="Example:\n\n  isic-vq card record model_cards/my-model runs/prior/model")
def record(
    folder: RepositoryFolder,
    model: Annotated[str, typer.Argument(help="Folder of the trained model, in its run's folder.")],
) -> None:
    """Add to a folder that was exported earlier how its model was trained: recipes, environment and plots.

    Its weights must be the model's, and stay as they are. `isic-vq export` does the same by itself.
    """
    from isic_vq.hub.export import record_training

    quiet_transformers()
    stages = record_training(folder, model)
    typer.echo(f"recorded {', '.join(stages) or 'no run'}; next: isic-vq card write {folder}")


@card_app.command(
    epilog="Example:\n\n  isic-vq card classifier runs/derm-features model_cards/isic-derm-features"
)
def classifier(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of isic-vq train classifier.")],
    folder: Annotated[Path, typer.Argument(help="Folder to write; what is there is replaced.")],
) -> None:
    """Write a trained classifier as a Hub repository's folder, with a card of its report's numbers."""
    from isic_vq.hub.classifier_card import export_classifier

    export_classifier(run, folder)
    typer.echo(f"wrote {folder}")


@app.command(epilog="Example:\n\n  isic-vq info model_cards/isic-vq-128")
def info(model: Annotated[str | None, typer.Argument(help="Model folder or Hub id.")] = None) -> None:
    """Describe a model: sizes, classes, licence, training images and measured quality."""
    from isic_vq.data.provenance import read_training_data
    from isic_vq.evaluation.report import Report
    from isic_vq.hub.pretrained import load_model, resolve
    from isic_vq.models.modeling_isic_vq import IsicVQModel

    quiet_transformers()
    loaded = load_model(IsicVQModel, model)
    folder = Path(resolve(model))
    vqvae, prior = loaded.config.vqvae_config, loaded.config.prior_config
    typer.echo(f"isic-vq {__version__}, model {folder.name}")
    typer.echo(
        f"tokenizer: {loaded.vqvae.num_parameters():,} parameters, {vqvae.image_size} px -> "
        f"{' + '.join(f'{side}x{side}' for side in vqvae.sides)} codes of {vqvae.num_codes}"
    )
    typer.echo(f"prior: {prior.model_type}, {loaded.prior.num_parameters():,} parameters")
    typer.echo(
        "classes: " + (", ".join(f"{i} {n}" for i, n in prior.id2label.items()) or "none (unconditional)")
    )
    typer.echo(f"weights licence: {loaded.config.license or 'not recorded'}")
    for stage, about in read_training_data(folder).items():
        licenses = about and ", ".join(f"{name} {count:,}" for name, count in about.licenses.items())
        known = about and f"{about.num_images:,} images of {about.name}, by licence: {licenses}"
        typer.echo(f"{stage} trained on {known or 'images that are not recorded'}")
    for path in sorted(folder.glob("reports/*.json")):
        print_report(Report.load(path))
