"""docs/cli.md, from the commands themselves: help, arguments, options and examples of each, by group."""

from pathlib import Path
from typing import Any

import typer

from isic_vq import cli
from isic_vq.cli.app import GROUPS, MOVED
from isic_vq.evaluation.report_tables import markdown_table

HEAD = """# Commands

All commands of `isic-vq`, with their options. Written by `python docs/build.py` from the commands themselves, and so the same as
`isic-vq COMMAND --help`. Use it to look an option up; the other pages say what to do.

`isic-vq --debug COMMAND` shows the traceback of an error, `isic-vq --version` the version. Commands that load a model take
`isic-vq-128` (the included checkpoint, also the default), a folder, or the id of a Hub repository.

The examples need images, models or servers of yours."""


def cli_page() -> str:
    """The page's text."""
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    parts = [HEAD]
    for group, names in GROUPS.items():
        parts.append(f"## {group}")
        for name in names:
            inner = getattr(commands[name], "commands", None)
            below = {f"{name} {word}": command for word, command in inner.items()} if inner else None
            for words, command in (below or {name: commands[name]}).items():
                parts += command_section(words, command)
    parts += [
        "## Commands of earlier versions",
        "Each names its successor when it is called.",
        markdown_table(
            ["command", "now"], [[f"`isic-vq {old}`", f"`{new}`"] for old, new in MOVED.items()], texts=2
        ),
    ]
    return "\n\n".join(parts) + "\n"


def command_section(words: str, command: Any) -> list[str]:
    """Title, help, parameters and examples of a command."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    usage = [(p.metavar or p.name.upper()).strip("[].") for p in arguments]
    usage = [
        f"{name}" if p.required else f"[{name}]{'...' if p.nargs == -1 else ''}"
        for p, name in zip(arguments, usage, strict=True)
    ]
    rows = [[option_cell(p), default_text(p), cell(p.help or "")] for p in command.params if p.name != "help"]
    parts = [
        f"### isic-vq {words}",
        "\n\n".join(" ".join(part.split()) for part in command.help.split("\n\n")),
        f"`{' '.join(['isic-vq', words, *usage, '[OPTIONS]'])}`",
        markdown_table(["parameter", "default", "what it does"], rows, texts=3),
    ]
    examples = [line.strip() for line in (command.epilog or "").splitlines() if line.startswith("  ")]
    return [*parts, "\n".join(["```bash", *examples, "```"])]


def option_cell(parameter: Any) -> str:
    """The names of a parameter."""
    if parameter.param_type_name == "argument":
        return f"`{(parameter.metavar or parameter.name.upper()).strip('[].')}`"
    names = ", ".join(f"`{name}`" for name in sorted([*parameter.opts, *parameter.secondary_opts], key=len))
    return names + (f" `{parameter.metavar}`" if parameter.metavar else "")


def default_text(parameter: Any) -> str:
    """The default of a parameter, or that there must be one."""
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False or callable(parameter.default):
        return ""
    shown = parameter.default
    return f"`{shown.as_posix() if isinstance(shown, Path) else shown}`"


def cell(text: str) -> str:
    """A text as a Markdown table's cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")
