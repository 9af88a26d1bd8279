"""The command that shows a model in a browser."""

from pathlib import Path
from typing import Annotated

import typer

from isic_vq.cli.app import ModelOption, app, check_first, quiet_transformers


@app.command(
    epilog="Examples:\n\n  isic-vq demo\n\n  isic-vq demo --index runs/codes/train.parquet --port 8000"
)
def demo(
    model: ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    index: Annotated[
        Path | None,
        typer.Option(help="Code cache of the training images (isic-vq encode): find the nearest ones."),
    ] = None,
    share: Annotated[bool, typer.Option("--share/--no-share", help="A public address, too.")] = False,
) -> None:
    """Open a page in the browser: generate, reconstruct, edit, and find the nearest training images."""
    check_first(model)
    from isic_vq.demo.server import serve

    quiet_transformers()
    serve(model, index, host, port, share, lambda url: typer.echo(f"serving at {url} (Ctrl+C stops)"))
