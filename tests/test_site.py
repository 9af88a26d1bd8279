"""The documentation's site builds without a warning, and its pages hold what mkdocstrings and the hook put there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason='the site needs pip install "isic-vq[docs]"')
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "-f",
        "docs/mkdocs.yml",
        "--strict",
        "-d",
        str(tmp_path),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.stem for path in tmp_path.glob("*.html")} == pages | {"404"}
    api = (tmp_path / "api.html").read_text()
    assert "IsicVQModel.generate" in api
    assert (tmp_path / "source" / "README.md.txt").read_bytes() == (ROOT / "README.md").read_bytes()
