"""What is mistyped is told before torch is imported, in under a second of CPU, without a class's name of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import json, sys, time
from isic_vq import cli
told = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["isic-vq", *arguments]
    try:
        cli.main()
        raise AssertionError(arguments)
    except SystemExit as end:
        assert end.code == 1, arguments
print(json.dumps([time.process_time(), sorted({"torch", "transformers", "datasets"} & set(sys.modules))]))
"""
SHIPPED = str(Path(__file__).resolve().parents[1] / "model_cards" / "isic-vq-128")
FILE = f"{SHIPPED}/config.json"
COMMANDS = [
    (["reconstruct", "nowhere/"], "Nothing matches parquet:nowhere"),
    (["reconstruct", f"{SHIPPED}/previews/*.png"], "names images: expected the folder that they lie in"),
    (["generate", "-o", FILE], f"{FILE} is a file: expected the name of a folder to write"),
    (["score", SHIPPED, "-o", f"{FILE}/a/b"], f"{FILE}/a/b cannot be written: {FILE} is a file"),
    (["reconstruct", SHIPPED, "-o", SHIPPED], f"{SHIPPED} lies in {SHIPPED}, whose images are read"),
    (["score", f"folder:{SHIPPED}", "-o", f"{SHIPPED}/new/a"], "choose a folder outside of it with --output"),
    (
        ["encode", SHIPPED, "--data", SHIPPED, "-o", SHIPPED],
        "is a folder: expected the name of a file to write",
    ),
    (["compress", SHIPPED, SHIPPED], "is a folder: expected the name of a file to write"),
    (["evaluate", SHIPPED, "--data", SHIPPED, "-o", SHIPPED], "is a folder: expected the name of a file"),
    (["data", "summary", "folder:nowhere"], "folder:nowhere is not a directory"),
    (["data", "prepare", "out", "--data", "test=folder:nowhere"], "folder:nowhere is not a directory"),
    (["encode", SHIPPED, "--data", "prepared:nowhere:train", "-o", "x"], "nowhere has no manifest.json"),
    (["evaluate", SHIPPED, "--data", "test=hf:x"], "unknown scheme 'hf'"),
    (["generate", "-m", "nowhere"], "nowhere is neither a model folder nor a Hub id"),
    (["generate", "-m", SHIPPED, "-l", "psoriasis"], "label 'psoriasis' is not a class of this model"),
    (["audit", "--train-codes", "nowhere.parquet", "--held-out-codes", "x"], "nowhere.parquet is not a file"),
    (["train", "stage=vqvae", "data.train=folder:nowhere"], "folder:nowhere is not a directory"),
    (
        ["train", "stage=vqvae", "data.train=synthetic:8:0", f"output_dir={FILE}"],
        f"{FILE} is a file: expected the name of a folder to write",
    ),
    (["train", "stage=prior", "tokenizer=nowhere"], "nowhere is neither a model folder nor a Hub id"),
    (
        ["train", "stage=vqvae", "image_size=64", "loop.max_steps=x", "data.trian=y"],
        "3 mistakes in the recipe: unknown recipe key image_size: did you mean model.image_size? | "
        "loop.max_steps: expected int, got str ('x') | unknown recipe key data.trian: did you mean data.train?",
    ),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Lines of all commands in one fresh interpreter, CPU seconds of all, and the large modules that it imported."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps([arguments for arguments, _ in COMMANDS])],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path_factory.mktemp("early"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    seconds, modules = json.loads(done.stdout)
    return done.stderr.splitlines(), seconds, modules


def test_each_is_one_line_that_names_it(told):
    lines, _, _ = told
    assert len(lines) == len(COMMANDS)
    for line, (_, message) in zip(lines, COMMANDS, strict=True):
        assert line.startswith("error: ")
        assert message in line
        assert not any(name in line for name in ("Recipe'", "validate_", "Model'", "Config"))


def test_nothing_large_is_imported(told):
    _, seconds, modules = told
    assert modules == []
    assert seconds < 1, "of all commands together"
