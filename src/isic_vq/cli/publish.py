"""Commands around a model's Hub repository: export, card, push, pull."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from isic_vq.cli.app import app, check_first, open_model, quiet_transformers
from isic_vq.cli.flags import options_of

SHOWN_LEFT_OUT = 20
RepositoryArgument = Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.")]


@app.command(
    epilog="Examples:\n\n  isic-vq export runs/prior/model model_cards/my-model --train-codes runs/codes/train.parquet\n\n"
    "  isic-vq export isic-vq-128 deployment --onnx\n\n  isic-vq export runs/derm-features model_cards/my-features"
)
@options_of("models/sampling.py:Sampling", panel="How the repository draws images by default", defaults=False)
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
    **sampling: Any,
) -> None:
    """Write a Hub repository folder: weights, processor, previews and provenance; or ONNX files alone."""
    from isic_vq.hub.classifier_card import export_classifier, is_classifier_run

    if is_classifier_run(Path(model)):
        if train_codes is not None or bf16 or onnx or sampling:
            raise ValueError("a classifier is exported as it is: leave out all options")
        export_classifier(Path(model), output)
        typer.echo(f"wrote {output}; next: {_push_command(output)}")
    elif train_codes is not None:
        from isic_vq.hub.export import export_repository

        quiet_transformers()
        export_repository(model, output, train_codes, bf16, onnx, **sampling)
        report = output / "reports" / "evaluation.json"
        typer.echo(f"wrote {output}; next: isic-vq evaluate {output} --data SOURCE -o {report}")
    elif onnx and not bf16 and not sampling:
        check_first(model)
        from isic_vq.hub.onnx_export import export_onnx, known_license

        paths = export_onnx(open_model(model, tokenizer=True), output, known_license(model))
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
        typer.echo(f"wrote {folder / 'README.md'}; next: {_push_command(folder)}")
        return
    from isic_vq.hub.card_check import check_card

    problems = check_card(folder)
    for problem in problems:
        typer.echo(problem, err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{folder / 'README.md'} says what the reports say; next: {_push_command(folder)}")


def _push_command(folder: Path) -> str:
    return f"isic-vq push {folder} USER/{folder.resolve().name}"


@app.command(epilog="Example:\n\n  isic-vq push model_cards/my-model user/my-model --dry-run")
@options_of(
    "hub/transfer.py:push",
    "private create_pr revision tag commit_message dry_run",
    private="private/--public",
    commit_message="message",
)
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Repository folder, as export leaves it.")],
    repo_id: RepositoryArgument,
    **settings: Any,
) -> None:
    """Make a Hub repository exactly what a repository folder holds, in one checked commit.

    Files that the folder lacks are deleted there. Only files of a model's layout go: no data images, caches,
    checkpoints or hidden files. A repeated push sends only what is missing.
    """
    from isic_vq.hub import transfer

    done = transfer.push(folder, repo_id, **settings)
    if done.result is None:
        for file in done.plan:
            typer.echo(f"{file.action:>8} {decimal(file.size):>9}  {file.path}")
    for path, num_bytes in done.left_out[:SHOWN_LEFT_OUT]:
        typer.echo(f"left out {decimal(num_bytes):>9}  {path}")
    if len(done.left_out) > SHOWN_LEFT_OUT:
        typer.echo(f"left out {len(done.left_out) - SHOWN_LEFT_OUT} more files")
    sent = [file.size for file in done.plan if file.action in ("add", "change")]
    gone = sum(file.action == "delete" for file in done.plan)
    what = f"{len(sent)} files ({decimal(sum(sent))}), {gone} deleted, {len(done.plan) - len(sent) - gone} unchanged"
    if done.result is None:
        state = "" if done.exists else ", which does not exist yet or is private"
        typer.echo(f"dry run: would push {what} to {repo_id}{state}")
    elif not done.result.changed:
        typer.echo(f"nothing to push: all {len(done.plan)} files are there, {done.result.url}")
    else:
        typer.echo(f"pushed {what}; checked at {done.result.pr_url or done.result.url}")


@app.command(epilog="Example:\n\n  isic-vq pull user/my-model -o models/my-model --revision v1.0")
@options_of("hub/transfer.py:pull", "revision")
def pull(
    repo_id: RepositoryArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; default: the repository's name.")
    ] = None,
    **settings: Any,
) -> None:
    """Copy a Hub repository of a model into a folder: whole, checked by hash, and nothing in it is run.

    A repeated pull asks only for the files that are missing.
    """
    from isic_vq.hub import transfer

    folder = transfer.pull(repo_id, output or Path(repo_id.rpartition("/")[2]), **settings)
    typer.echo(f"wrote {folder}; next: isic-vq info {folder}")
