"""Commands around a model's repository folder: export, card, description."""

from pathlib import Path
from typing import Annotated

import typer

from isic_vq import __version__
from isic_vq.cli.app import app, check_first, quiet_transformers
from isic_vq.cli.measuring import print_report


@app.command(
    epilog="Examples:\n\n  isic-vq export runs/prior/model model_cards/my-model --train-codes runs/codes/train.parquet\n\n"
    "  isic-vq export isic-vq-128 deployment --onnx\n\n  isic-vq export runs/derm-features model_cards/my-features"
)
def export(
    model: Annotated[str, typer.Argument(help="Folder of a whole model, or of a classifier's finished run.")],
    output: Annotated[
        Path, typer.Argument(help="Repository folder to write; replaced whole, but for --onnx alone.")
    ],
    train_codes: Annotated[
        Path | None, typer.Option(help="Code cache of the training images: their provenance.")
    ] = None,
    bf16: Annotated[
        bool,
        typer.Option(
            "--bf16", help="Store the prior and the decoder in half the space; codes stay the same."
        ),
    ] = False,
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx",
            help="Add the tokenizer as ONNX files, for programs without torch; without --train-codes these alone. "
            "Needs the extra onnx.",
        ),
    ] = False,
) -> None:
    """Write a Hub repository folder: weights, processor, previews and provenance; or ONNX files alone."""
    from isic_vq.hub.classifier_card import export_classifier, is_classifier_run

    if is_classifier_run(Path(model)):
        if train_codes is not None or bf16 or onnx:
            raise ValueError("a classifier is exported as it is: leave out --train-codes, --bf16 and --onnx")
        export_classifier(Path(model), output)
        typer.echo(f"wrote {output}")
    elif train_codes is not None:
        from isic_vq.hub.export import export_repository

        quiet_transformers()
        export_repository(model, output, train_codes, bf16, onnx)
        typer.echo(
            f"wrote {output}; next: isic-vq evaluate {output} --data ... -o {output}/reports/..., isic-vq card {output}"
        )
    elif onnx and not bf16:
        check_first(model)
        from isic_vq.hub.onnx_export import export_onnx, known_license
        from isic_vq.hub.pretrained import load_model
        from isic_vq.models.modeling_vqvae import VQVAEModel

        quiet_transformers()
        paths = export_onnx(load_model(VQVAEModel, model), output, known_license(model))
        typer.echo(f"wrote {' and '.join(map(str, paths))}")
    else:
        raise ValueError(
            "expected --train-codes with the code cache of the training images, or --onnx alone for ONNX files"
        )


@app.command(
    epilog="Examples:\n\n  isic-vq card model_cards/my-model\n\n  isic-vq card model_cards/my-model --check\n\n"
    "  isic-vq card model_cards/my-model --record runs/prior/model"
)
def card(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Repository folder, as export leaves it, with reports/.")
    ],
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Write nothing: compare the card with the reports (metadata, every number, links, pictures), print a "
            "line for each problem, and exit with 1 if there is any.",
        ),
    ] = False,
    record: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Trained model in its run's folder: first add how it was trained (recipes, environment, plots) to a "
            "folder that was exported without. Its weights must be the folder's.",
        ),
    ] = None,
) -> None:
    """Render the model card of a repository folder from its reports and its provenance, or check it."""
    if check and record is not None:
        raise ValueError("--check writes nothing and --record does: expected one of them")
    if record is not None:
        from isic_vq.hub.export import record_training

        quiet_transformers()
        typer.echo(f"recorded {', '.join(record_training(folder, record)) or 'no run'}")
    if not check:
        from isic_vq.hub.card import write_card

        write_card(folder)
        typer.echo(f"wrote {folder / 'README.md'}; next: isic-vq card {folder} --check")
        return
    from isic_vq.hub.card_check import check_card

    problems = check_card(folder)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{folder / 'README.md'} says what the reports say")


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
