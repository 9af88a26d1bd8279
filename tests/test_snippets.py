"""The code in README, docs and cards runs as it stands, offline; the README's in the fast part, the others' in the slow one.

A Python block is a program of its own; one that trusts a repository's code runs where `isic_vq` cannot be imported. The shell blocks
of README run one after the other in one folder, with smaller numbers (`reduced`); the
shell blocks of docs, cards and examples are parsed.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

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
def place(tmp_path_factory):
    """A folder that holds what README and docs name: checkpoints, examples, images."""
    folder = tmp_path_factory.mktemp("snippets")
    for name in ("model_cards", "examples"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "photos").mkdir()
    for index in range(2):
        synthetic_image(index, seed=0).save(folder / "photos" / f"{index}.jpg")
    synthetic_image(0, seed=0, size=512).save(folder / "photo.jpg")
    white = np.zeros((512, 512), np.uint8)
    white[192:320, 192:320] = 255
    Image.fromarray(white).save(folder / "mask.png")
    for images, number in (("my_images", 24), ("my_test_images", 4)):
        for index in range(number):
            target = folder / images / ("psoriasis", "eczema")[index % 2]
            target.mkdir(parents=True, exist_ok=True)
            synthetic_image(index, seed=1).save(target / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def readme_commands(place):
    """The README's shell commands, run in `place`; those that failed."""
    # Tests before it in this process may have trained in another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    yield run_commands(README, place)
    AcceleratorState._reset_state(reset_partial_state=True)


def python_programs(paths):
    return {
        (title(path) if path.is_relative_to(ROOT) else path.name, index): (code, needs_package(code))
        for path in paths
        for index, code in enumerate(blocks(path, "python"))
    }


def failures(outcomes):
    return {name: errors for name, errors in outcomes.items() if errors is not None}


def test_the_readmes_python_blocks_run(place):
    programs = python_programs([README])
    assert programs
    assert failures(run_all(programs, place)) == {}


def test_the_readmes_commands_run(readme_commands, place):
    assert readme_commands == []
    for name in (
        "samples/grid.png",
        "codes.parquet",
        "images.ivq",
        "edited/melanoma",
        "scores",
        "my-model/README.md",
    ):
        assert (place / name).exists(), name


@pytest.mark.slow
def test_python_blocks_of_docs_and_cards_run(readme_commands, place, tiny_card):
    assert readme_commands == [], "pages use what the README's commands wrote"
    for card in (*CARDS, tiny_card):  # copied, as a pull leaves it: a clone's code files are links
        shutil.copytree(card.parent, place / card.parent.name)
    shutil.copy(place / "photo.jpg", place / "image.jpg")
    programs = python_programs([*DOCS, *CARDS, tiny_card])
    named = [name for name, _ in programs]
    assert named.count(tiny_card.name) == 2, "a freshly rendered card shows every way of loading"
    outcomes = run_all({**programs, **{name: FAILING[name][:2] for name in FAILING}}, place)
    assert [name for name, (*_, text) in FAILING.items() if text not in outcomes.pop(name)] == [], (
        "the runner"
    )
    assert failures(outcomes) == {}


def test_every_block_is_of_a_language_that_tests_read():
    pages = "\n".join(path.read_text() for path in (README, *DOCS))
    assert set(re.findall(r"^```(\w*)\n.*?^```$", pages, re.DOTALL | re.MULTILINE)) <= {
        "bash",
        "python",
        "text",
        "bibtex",
    }
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet -c constraints.txt -e ".[dev]"' in ci
    assert "pytest -n 2 --dist worksteal" in ci, "the README's installation and tests run there"


def words_of(block):
    """The commands of a shell block, as words."""
    lines = [part for line in block.replace("\\\n", " ").splitlines() for part in line.split(" && ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def reduced(words):
    """A command with numbers that a test has time for, which change nothing else."""
    words = list(words)
    for index, word in enumerate(words[:-1]):
        if word in ("-n", "--num-images"):
            words[index + 1] = str(min(2, int(words[index + 1])))
    if words[1] == "train":
        stage = yaml.safe_load((ROOT / words[2]).read_text())["stage"]
        words = [re.sub(r"(?<=max_steps=)\d+", lambda m: str(int(m[0]) // 50), word) for word in words]
        words += [] if any("max_steps" in word for word in words) else ["loop.max_steps=2"]
        words += ["loop.batch_size=4", "loop.save_every=1"]
        words += ["num_samples=4", "model.num_layers=1"] if stage == "prior" else ["model.num_codes=16"]
    return words


def run_commands(path, folder):
    """Run the shell blocks of a file in a folder; what failed, and how."""
    failed = []
    for block in blocks(path, "bash"):
        for words in words_of(block):
            if words[0] in ("pip", "pytest"):
                continue  # .ci/run does that
            problem = run_command(words, folder)
            failed += [f"{title(path)}: {shlex.join(words)}: {problem}"] if problem else []
    return failed


def run_command(words, folder):
    """Run a command in this process if it can, otherwise as a program; what it wrote if it failed."""
    if words[0] == "torchrun":
        words = ["isic-vq", *words[words.index("isic_vq") + 1 :]]
    if words[0] != "isic-vq":
        program = [sys.executable, *words[1:]] if words[0] == "python" else words
        done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)
        return done.stderr if done.returncode else None
    written = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(written):
        patch.chdir(folder)
        patch.setattr(sys, "argv", reduced(words))
        with contextlib.redirect_stderr(written):
            try:
                cli.main()
            except SystemExit as end:
                return written.getvalue() if end.code else None
    return None


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
    """The words of each `isic-vq` command in a file's shell blocks, also of those that launchers start."""
    text = "\n".join(blocks(path, "bash")).replace("\\\n", " ")
    text = re.sub(r"^torchrun .*-m isic_vq\b", "isic-vq", text, flags=re.MULTILINE)
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
        for path in (README, *DOCS, *CARDS, *sorted((ROOT / "examples").rglob("*.md")))
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


def options_of(command):
    """The options of a command and of all commands below it."""
    below = (options_of(inner) for inner in getattr(command, "commands", {}).values())
    return {
        name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)
    }.union(*below)


def test_every_option_that_the_pages_name_exists():
    others = {"--help", "--nproc-per-node", "--dist"}  # click's, torchrun's, pytest's
    known = options_of(typer.main.get_command(cli.app)) | others
    named = {
        (title(path), option)
        for path in (README, *DOCS, *CARDS)
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", path.read_text())
    }
    assert len(named) > 50
    assert [pair for pair in sorted(named) if pair[1] not in known] == []


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
