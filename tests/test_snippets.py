"""The code in README and cards runs as it stands, offline, each block as a program of its own.

Blocks that trust a repository's code run where `isic_vq` cannot be imported. Shell blocks are parsed, and the first
command of the README is run.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from isic_vq import cli
from isic_vq.data.synthetic_images import synthetic_image
from isic_vq.hub.card import write_card
from tiny_repository import write_model, write_repository

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))
DOCS = sorted((ROOT / "docs").glob("*.md"))
RUNNER = Path(__file__).with_name("snippet_runner.py")
# Ways to open a model that a card must show, with the package and without it.
DOORS = {
    True: [
        "pipeline(",
        "IsicVQModel.from_pretrained",
        "VQVAEModel.from_pretrained",
        "IsicVQPipeline.from_pretrained",
    ],
    False: ["pipeline(", "AutoModel.from_pretrained", "DiffusionPipeline.from_pretrained"],
}


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def needs_package(code):
    return "trust_remote_code=True" not in code


def title(path):
    return path.relative_to(ROOT).as_posix()


# Code that must fail, and with what: the runner's own test.
FAILING = {
    "failure": ("raise SystemExit(3)", True, "SystemExit: 3"),
    "absence": ("import isic_vq", False, "No module named 'isic_vq'"),
    "network": ("import socket; socket.create_connection(('127.0.0.1', 9))", True, "reached for the network"),
}


def run_all(programs, folder):
    """Run (code, whether the package is there) by name in a folder; what each wrote if it failed, by name."""
    tasks = {
        name: {"code": code, "folder": str(folder), "package": package}
        for name, (code, package) in programs.items()
    }
    done = subprocess.run(
        [sys.executable, RUNNER],
        input=json.dumps([*tasks.values()]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(tasks, json.loads(done.stdout), strict=True))


@pytest.fixture(scope="module")
def tiny_card(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fresh")
    write_model(folder)
    write_card(write_repository(folder))
    return folder / "tiny" / "README.md"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, tiny_card):
    """Every block's outcome, in a folder that holds what README and cards name."""
    folder = tmp_path_factory.mktemp("snippets")
    (folder / "model_cards").symlink_to(ROOT / "model_cards")
    for card in (*CARDS, tiny_card):  # copied, as a pull leaves it: a clone's code files are links
        shutil.copytree(card.parent, folder / card.parent.name)
    synthetic_image(0, seed=0).save(folder / "image.jpg")
    programs = {
        (path, index): (code, needs_package(code))
        for path in (README, *DOCS, *CARDS, tiny_card)
        for index, code in enumerate(blocks(path, "python"))
    }
    return run_all({**programs, **{name: FAILING[name][:2] for name in FAILING}}, folder)


@pytest.mark.slow
def test_python_blocks_run(tiny_card, outcomes):
    assert [name for name, (*_, text) in FAILING.items() if text not in outcomes.pop(name)] == [], (
        "the runner"
    )
    paths = [path for path, _ in outcomes]
    assert min(map(paths.count, (README, *CARDS, tiny_card))) >= 1
    assert paths.count(tiny_card) == 2, "a freshly rendered card shows every way of loading"
    assert {name: errors for name, errors in outcomes.items() if errors is not None} == {}


def test_cards_show_every_way_of_loading():
    cards = [card for card in CARDS if card.with_name("model_index.json").is_file()]
    assert cards
    missing = []
    for path in cards:
        for package, doors in DOORS.items():
            code = "\n".join(block for block in blocks(path, "python") if needs_package(block) == package)
            missing += [f"{title(path)}: {door}" for door in doors if door not in code]
    assert missing == []


def command_lines(path):
    """The words of each `isic-vq` command in a file's shell blocks."""
    text = "\n".join(blocks(path, "bash")).replace("\\\n", " ")
    lines = [part.strip() for line in text.splitlines() for part in re.split(r"&&|;|\|", line)]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"isic-vq\b", line)]


def parse(words):
    """Raise for an unknown command or option, or a missing argument."""
    command, rest = typer.main.get_command(cli.app), words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(words[-1 - len(rest)], rest)


def test_shell_commands_parse():
    lines = [
        (title(path), words)
        for path in (README, *CARDS, *sorted((ROOT / "examples").rglob("*.md")))
        for words in command_lines(path)
    ]
    violations = []
    for path, words in lines:
        try:
            parse(words)
        except Exception as error:  # whatever the parser finds
            violations.append(f"{path}: {shlex.join(words)}: {error!r}")
    assert len(lines) > 5
    assert violations == []


def test_the_first_command_of_the_readme_generates_images(run, tmp_path, monkeypatch):
    words = command_lines(README)[0]
    assert words == ["isic-vq", "generate", "--num-images", "16"]
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run(*words[1:-1], "2")
    assert code == 0, stderr
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {
        "grid.png",
        "image-00000.png",
        "image-00001.png",
    }
