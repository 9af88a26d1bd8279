"""Nothing that is published names a folder of the machine it was made on, or a private host."""

import json
import re
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from isic_vq.evaluation.report import ABSOLUTE_PATH

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "examples", "model_cards", "tests", "docs", "benchmarks", ".ci")
ROOT_SUFFIXES = {"", ".md", ".toml", ".yaml", ".yml", ".txt", ".cfg"}
ROOT_NAMES = {"LICENSE", "LICENSE-WEIGHTS", ".gitignore"}

# Folders where people and machines keep their own things, at the start of a path.
MACHINE_PATH = re.compile(
    rb"(?<![\w.}/-])(?:/(?:home|root|work|tmp|mnt|media|Users|var|opt|data|srv|workspace|content)/+[\w.{$-]"
    rb"|[A-Za-z]:\\{1,2}[A-Za-z]\w+)|file:///\w"
)
# These test that such paths are refused, and so have to spell some.
SPELL_PATHS = {
    "tests/evaluation/test_report.py",
    "tests/training/test_recipe.py",
    "tests/test_no_local_paths.py",
}
URL = re.compile(r"https?://[^\s\"'<>)\]`]+")
PUBLIC_HOSTS = {
    "127.0.0.1",  # servers of tests
    "localhost",
    "api.isic-archive.com",
    "arxiv.org",
    "challenge.isic-archive.com",
    "creativecommons.org",
    "docs.pypi.org",
    "doi.org",
    "download.pytorch.org",
    "example.org",
    "git-lfs.github.com",
    "github.com",
    "huggingface.co",
    "img.shields.io",
    "isic-archive.s3.us-east-1.amazonaws.com",
    "isic-challenge-data.s3.amazonaws.com",
    "pypi.org",
    "www.apache.org",
    "www.isic-archive.com",
}


def shipped_files():
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    found += [
        path for path in ROOT.iterdir() if path.suffix in ROOT_SUFFIXES - {""} or path.name in ROOT_NAMES
    ]
    kept = [path for path in found if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix(): path for path in sorted(kept)}


FILES = shipped_files()


def texts_of(content):
    """Every string in a JSON value, keys included."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from texts_of(value)
    elif isinstance(content, list):
        for value in content:
            yield from texts_of(value)
    elif isinstance(content, str):
        yield content


def metadata_of(weights):
    """The JSON header of a safetensors file: tensor names and the writer's own metadata."""
    with weights.open("rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def test_the_search_sees_the_files_that_matter():
    assert {"pyproject.toml", "src/isic_vq/cli/app.py", "tests/conftest.py", ".ci/run"} <= set(FILES)
    assert any(name.startswith("examples/configs/") for name in FILES)


def test_the_search_finds_paths_of_a_machine_and_leaves_others_alone():
    paths = [
        "/home/someone/x",
        "cd /root/x",
        "'/tmp/run'",
        '"/work/somewhere"',
        "=/mnt/disk",
        r"C:\data",
        r"C:\\data",
        "file:///a",
    ]
    others = [
        "runs/tmp/x",
        "${HOME}/tmp/x",
        "https://example.org/data/x",
        "model_cards/work/x",
        "a/home/b",
        "std::vector",
    ]
    assert [text for text in paths + others if MACHINE_PATH.search(text.encode())] == paths


def machine_paths(path):
    """Line and text of every path of a machine in a file."""
    content = path.read_bytes()
    for match in MACHINE_PATH.finditer(content):
        if (
            path.suffix not in (".safetensors", ".png") or len(match[0]) > 7
        ):  # weights may spell anything short
            yield content.count(b"\n", 0, match.start()) + 1, match[0].decode()


def test_no_shipped_file_names_a_folder_of_a_machine():
    searched = {name: path for name, path in FILES.items() if name not in SPELL_PATHS}
    found = [
        f"{name}:{line}: {text}" for name, path in searched.items() for line, text in machine_paths(path)
    ]
    assert found == []


def test_no_shipped_file_names_this_checkout():
    """The one check that holds wherever the files were made: they were made here."""
    here = str(ROOT).encode()
    assert [name for name, path in FILES.items() if here in path.read_bytes()] == []


def absolute_paths(name, content):
    return [f"{name}: {text}" for text in texts_of(content) if ABSOLUTE_PATH.search(text)]


def test_no_json_text_looks_like_an_absolute_path():
    names = [name for name in FILES if name.endswith(".json")]
    assert names
    assert [
        line for name in names for line in absolute_paths(name, json.loads(FILES[name].read_text()))
    ] == []


def test_weights_hold_no_metadata_but_their_format():
    headers = {name: metadata_of(path) for name, path in FILES.items() if name.endswith(".safetensors")}
    assert headers
    metadata = {name: header.pop("__metadata__", {}) for name, header in headers.items()}
    assert {name: value for name, value in metadata.items() if value not in ({}, {"format": "pt"})} == {}
    assert [line for name, header in headers.items() for line in absolute_paths(name, list(header))] == []


def test_pictures_carry_no_path_and_no_camera_data():
    names, violations = [name for name in FILES if name.endswith(".png")], []
    assert names
    for name in names:
        with Image.open(FILES[name]) as image:
            violations += [f"{name}: EXIF"] if image.getexif() else []
            violations += absolute_paths(name, dict(image.info))
    assert violations == []


def test_addresses_are_those_of_public_hosts():
    """No package index or proxy of one network, no address of one machine."""
    hosts = {
        (urlsplit(address).hostname, name)
        for name, path in FILES.items()
        if path.suffix not in (".safetensors", ".png", ".parquet")
        for address in URL.findall(path.read_text(encoding="utf-8"))
    }
    assert sorted((host, name) for host, name in hosts if host not in PUBLIC_HOSTS) == []


def test_no_package_index_is_configured():
    configured = [
        name
        for name, path in FILES.items()
        if name != "tests/test_no_local_paths.py"
        and re.search(rb"(?:extra-)?index-url|trusted-host|\[\[tool\.uv\.index\]\]", path.read_bytes())
    ]
    assert configured == [], "where packages come from is the business of whoever installs them"
