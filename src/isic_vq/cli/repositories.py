"""Commands that bring repositories to the Hub and back: push, pull."""

from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal

from isic_vq.cli.app import app

SHOWN_LEFT_OUT = 20
RepositoryArgument = Annotated[str, typer.Argument(metavar="USER/NAME", help="Repository on the Hub.")]


@app.command(epilog="Example:\n\n  isic-vq push model_cards/my-model user/my-model --dry-run")
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Repository folder, as export leaves it.")],
    repo_id: RepositoryArgument,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility; default: as it is, or the account's."),
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it as a pull request.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, made if need be; default: main.")] = None,
    tag: Annotated[str | None, typer.Option(help="New tag for the commit, such as v1.0.")] = None,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would go and what not; write nothing.")
    ] = False,
) -> None:
    """Make a Hub repository exactly what a repository folder holds, in one checked commit.

    Files that the folder lacks are deleted there. Only files of a model's layout go: no data images, caches,
    checkpoints or hidden files. A repeated push sends only what is missing.
    """
    from isic_vq.hub import transfer

    settings = {} if message is None else {"commit_message": message}
    done = transfer.push(
        folder,
        repo_id,
        private=private,
        create_pr=create_pr,
        revision=revision,
        tag=tag,
        dry_run=dry_run,
        **settings,
    )
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
def pull(
    repo_id: RepositoryArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; default: the repository's name.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: main.")] = None,
) -> None:
    """Copy a Hub repository of a model into a folder: whole, checked by hash, and nothing in it is run.

    A repeated pull asks only for the files that are missing.
    """
    from isic_vq.hub import transfer

    folder = transfer.pull(repo_id, output or Path(repo_id.rpartition("/")[2]), revision=revision)
    typer.echo(f"wrote {folder}; next: isic-vq info {folder}")
