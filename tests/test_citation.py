"""CITATION.cff and the README's BibTeX name this package, its version and what it builds on."""

import re
from pathlib import Path

import yaml

from isic_vq import __version__

ROOT = Path(__file__).resolve().parents[1]


def test_the_citation_file_has_what_the_format_requires_and_the_packages_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # required by version 1.2.0
    assert citation["cff-version"] == "1.2.0"
    assert citation["type"] == "software"
    assert citation["version"] == __version__
    assert citation["license"] in (ROOT / "pyproject.toml").read_text()
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year"} <= reference.keys()
        assert "url" in reference or "doi" in reference


def test_the_readmes_bibtex_is_the_citation_files():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (entry,) = re.findall(r"```bibtex\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    fields = dict(re.findall(r"^\s+(\w+)\s*=\s*\{+(.*?)\}+,?$", entry, flags=re.MULTILINE))
    assert entry.startswith("@software{")
    assert fields["title"] == citation["title"]
    assert fields["author"] == citation["authors"][0]["name"]
    assert fields["version"] == citation["version"]
