"""Commands around a model's repository folder: export, card, description."""

from pathlib import Path
from typing import Annotated

import typer

from isic_vq import __version__
from isic_vq.cli.app import app, quiet_transformers
from isic_vq.cli.measuring import print_report


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

    quiet_transformers()
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

    quiet_transformers()
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
        print_report(Report.load(path))
