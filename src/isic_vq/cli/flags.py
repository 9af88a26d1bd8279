"""Options of commands that are declared once: by the function or the dataclass whose settings they are.

Names, types, defaults and help are read from the source and its docstring. Importing it would import torch, which
`--help` must not.
"""

import ast
import inspect
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

PACKAGE = Path(__file__).parents[1]
TYPES = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "Path": Path,
    "Collection[str]": list[str],
    "Sequence[str]": list[str],
    "Sequence[int]": list[int],
    "tuple[str, ...]": list[str],
}
HELP = r"^ {4}(\w+): (.*?)(?=^ {0,4}\S|\n\n|\Z)"
SHORT = {"output": "-o", "label": "-l", "labels": "-l", "num_images": "-n"}


class Setting(NamedTuple):
    """A parameter of a function or a field of a dataclass."""

    name: str
    annotation: str  # as the source has it
    default: Any  # None where there is none
    help: str  # from the docstring


def settings_of(target: str) -> dict[str, Setting]:
    """Settings by name, of a top-level function or class such as "models/sampling.py:Sampling"."""
    path, _, name = target.partition(":")
    text = (PACKAGE / path).read_text(encoding="utf-8")
    start = re.search(rf"^(def|class) {name}\b", text, re.MULTILINE)
    assert start is not None, target
    (node,) = ast.parse(text[start.start() :].split("\n\n\n")[0]).body
    if isinstance(node, ast.ClassDef):
        fields = [
            (statement.target.id, statement.annotation, statement.value)
            for statement in node.body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        ]
    else:
        assert isinstance(node, ast.FunctionDef), target
        places = [*node.args.posonlyargs, *node.args.args]
        defaults = [None] * (len(places) - len(node.args.defaults)) + node.args.defaults
        pairs = [
            *zip(places, defaults, strict=True),
            *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
        ]
        fields = [(place.arg, place.annotation, default) for place, default in pairs if place.annotation]
    told = dict(re.findall(HELP, ast.get_docstring(node) or "", re.MULTILINE | re.DOTALL))
    return {
        name: Setting(name, ast.unparse(annotation), _literal(default), " ".join(told.get(name, "").split()))
        for name, annotation, default in fields
    }


def _literal(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None  # a constant or a factory: the function's own default is taken


def _parameter(setting: Setting, option: str, panel: str | None) -> inspect.Parameter:
    kind: Any = TYPES[setting.annotation.removesuffix(" | None")]
    default = setting.default
    several = kind in (list[str], list[int])
    if several:
        kind, default = kind | None, None
    elif default is None:
        kind = kind | None
    names = [f"--{option}", *([SHORT[setting.name]] if setting.name in SHORT else [])]
    text = re.sub(r"`(\w+)`", r"\1", re.sub(r"[;,] see `[^`]+`", "", setting.help))
    text = text[:1].upper() + text[1:] + (" Repeat it for several." if several else "")
    info = typer.Option(*names, help=text, rich_help_panel=panel)
    return inspect.Parameter(
        setting.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def options_of(
    target: str, names: str = "", panel: str | None = None, defaults: bool = True, **renamed: str
) -> Callable[[Callable], Callable]:
    """Add options to a command, which gets those that were given, or have a default, as `**settings`.

    Args:
        target: what they set, such as "models/sampling.py:Sampling".
        names: which of its settings, separated by blanks; by default all.
        panel: heading of these options in the help.
        defaults: whether they have the target's defaults; without, only options that were given are passed on.
        renamed: options of another name than the setting's, such as `num_views="views"`.
    """
    settings = settings_of(target)
    chosen = [settings[name] for name in names.split()] if names else list(settings.values())
    added = [
        _parameter(
            setting if defaults else setting._replace(default=None),
            renamed.get(setting.name, setting.name.replace("_", "-")),
            panel,
        )
        for setting in chosen
    ]

    def decorate(command: Callable) -> Callable:
        @wraps(command)
        def call(**arguments: Any) -> Any:
            # Options that were left out take the target's defaults.
            return command(
                **{k: value for k, value in arguments.items() if k not in options or value is not None}
            )

        options = {parameter.name for parameter in added}
        signature = inspect.signature(command)
        kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        call.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        return call

    return decorate
