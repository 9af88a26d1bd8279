"""The command line's frame: the application that commands join, the options they share, errors in one line."""

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError
from typer.core import TyperGroup

from isic_vq import __version__
from isic_vq.allocator import keep_freed_memory
from isic_vq.data.uri import SCHEMES


@contextmanager
def _interruption_told() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        typer.echo(f"interrupted: {error}" if str(error) else "interrupted", err=True)
        raise typer.Exit(130) from error


# The commands in the order in which one uses them.
GROUPS = {
    "Use a model": ("generate", "reconstruct", "edit", "score", "compress", "decompress", "demo", "info"),
    "Train": ("train", "encode", "figures"),
    "Data": ("data",),
    "Judge a model": ("evaluate", "audit"),
    "Publish": ("export", "card", "push", "pull"),
}
# Commands of earlier versions, and what does the same now.
MOVED = {
    "train vqvae": "isic-vq train CONFIG",
    "train prior": "isic-vq train CONFIG",
    "train decoder": "isic-vq train CONFIG",
    "train classifier": "isic-vq train CONFIG",
    "ood": "isic-vq evaluate --only ood",
    "sheets": "isic-vq evaluate --only sheets",
    "study utility": "isic-vq evaluate --only utility",
    "study realism": "isic-vq evaluate --only realism",
    "study sampling": "python examples/studies/sampling_study.py",
    "study granularity": "python examples/studies/granularity.py CONFIG",
    "study generalization": "python examples/studies/generalization.py CONFIG",
    "onnx": "isic-vq export MODEL DIR --onnx",
    "card write": "isic-vq card DIR",
    "card check": "isic-vq card DIR --check",
    "card record": "isic-vq card DIR --record MODEL",
    "card classifier": "isic-vq export RUN DIR",
}


class _Commands(TyperGroup):
    """The commands by group; an interrupted one says where it stopped, which typer alone would swallow."""

    def list_commands(self, ctx: Any) -> list[str]:
        for panel, names in GROUPS.items():
            for name in names:
                self.commands[name].rich_help_panel = panel  # type: ignore[attr-defined]
        return [name for names in GROUPS.values() for name in names]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        for words in (" ".join(args[:2]), args[0]):
            if words in MOVED:
                raise ValueError(f"isic-vq {words} is now {MOVED[words]}")
        return super().resolve_command(ctx, args)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _interruption_told():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _interruption_told():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Commands,
    help="Discrete generative models of dermoscopy images. A research tool, not a diagnostic device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Model folder or Hub id; default: the shipped checkpoint.")
]
DataOption = Annotated[str, typer.Option("--data", help=f"{SCHEMES}.")]
ClassesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--classes",
        help="Your own classes beside ISIC's, separated by commas; auto: every name that occurs; none: no labels. "
        "Default: ISIC's eight.",
    ),
]
OtherClassesOption = Annotated[
    bool,
    typer.Option(
        "--drop-other-classes", help="Leave out, and count, images of classes that are not declared."
    ),
]
DataArgument = Annotated[str, typer.Argument(help="Image file, folder, or a URI as for --data of encode.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 or mps; default: a GPU if there is one.")
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run in output_dir.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the recipe.")
]

_debug = False


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"isic-vq {__version__}")
        raise typer.Exit


@app.callback()
def configure(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Set up messages for every command."""
    global _debug
    _debug = debug
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("isic_vq").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # Pillow's; ours is an error


def check_first(
    *models: str | None,
    sources: Iterable[str | None] = (),
    labels: Iterable[str] = (),
    codes: Iterable[Path | None] = (),
    seed: int = 0,
    folder: Path | None = None,
    file: Path | None = None,
) -> None:
    """Refuse mistyped models, sources, labels of the first model and code caches before any large library is imported.

    So it does a `folder` or a `file` to write that is there and is the other one, or lies below a file, and a `folder` in
    one of images that are read, whose next reading would count what is written. A model of None is the shipped checkpoint;
    sources and caches of None are left out.

    Raises:
        ValueError: there is no such model, file, folder or class, the folder lies in a source, or the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}: expected 0 or more")
    for path, wanted, other in ((folder, "folder", "file"), (file, "file", "folder")):
        if path is None:
            continue
        if path.exists() and path.is_file() != (wanted == "file"):
            raise ValueError(f"{path} is a {other}: expected the name of a {wanted} to write")
        if above := next((parent for parent in path.parents if parent.is_file()), None):
            raise ValueError(f"{path} cannot be written: {above} is a file")
    from isic_vq.data.uri import check_uri
    from isic_vq.hub.pretrained import class_names_of, resolve
    from isic_vq.models.diagnosis import resolve_label

    for uri in sources:
        if uri is not None and not Path(uri).is_file():
            for place in check_uri(uri):
                if folder is not None and folder.resolve().is_relative_to(Path(place).resolve()):
                    raise ValueError(
                        f"{folder} lies in {uri}, whose images are read: what is written there would be read the next time; "
                        "choose a folder outside of it with --output"
                    )
    for path in codes:
        if path is not None and not path.is_file():
            raise ValueError(f"{path} is not a file: write it with isic-vq encode")
    folders = [resolve(model) for model in models]
    for label in labels:
        names = class_names_of(folders[0])
        if names is not None:
            resolve_label(label, names)


def declared_classes(classes: list[str] | None, drop_others: bool) -> Any:
    """What --classes and --drop-other-classes say, as `find_source` takes it; None if they say nothing."""
    from isic_vq.data.classes import Classes

    if classes is None and not drop_others:
        return None
    return Classes.parse(None if classes is None else ",".join(classes), drop_others)


def quiet_transformers() -> None:
    """Hide transformers' loading bars; its warnings stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def open_model(model: str | None, device: str | None = None, tokenizer: bool = False) -> Any:
    """Load a whole model, or a tokenizer alone."""
    from isic_vq.hub.pretrained import load_model
    from isic_vq.models.modeling_isic_vq import IsicVQModel
    from isic_vq.models.modeling_vqvae import VQVAEModel

    quiet_transformers()
    return load_model(VQVAEModel if tokenizer else IsicVQModel, model, device)


def main() -> None:
    """Run the command line; errors are printed in one line, which says so where they are the program's own."""
    try:
        keep_freed_memory()
        app()
    except (ValueError, OSError, RuntimeError, ImportError, SafetensorError) as error:
        if _debug:
            raise
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    except Exception as error:
        if _debug:
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        typer.echo(
            f"error: {what} (this is a bug in isic-vq: please report it with what isic-vq --debug shows)",
            err=True,
        )
        sys.exit(1)
