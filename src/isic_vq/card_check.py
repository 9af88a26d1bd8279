"""Check that a model card says what its folder's files say.

Prose may be written by hand, numbers may not: a line with a number, in code too, must be one that
`isic_vq.card.render_card` writes for the folder, and the metadata and the table of measurements must be as it
writes them. Linked files must be there, and pictures must say that isic-vq made them: others may be of patients.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml
from huggingface_hub import ModelCard

from isic_vq.card import DATASET_TITLES, metric_table, read_reports, render_card
from isic_vq.hub import ModelError
from isic_vq.layout import check_picture

# What the renderer alone decides; of `tags` there may be more.
KEYS = ("license", "library_name", "pipeline_tag", "metrics")
MEASURED_ON = ("n", "seed")  # arguments of a metric that tell it from others of its name
PICTURE_FOLDERS = ("previews", "figures")
CODE_BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|(?:src|href)=[\"']([^\"']+)")
NUMBER = re.compile(r"[-+]?\.?\d[\w.,+%]*")
NAME = re.compile(r"[A-Za-z][\w-]*\d[\w-]*")


def check_card(folder: Path) -> list[str]:
    """What is wrong with a repository folder's README.md, a line each; nothing if it is as it should be.

    Raises:
        ValueError: as `render_card`, since there is nothing to compare the card with.
    """
    path = folder / "README.md"
    if not path.is_file():
        return ["README.md is missing: run isic-vq card write"]
    try:
        card = ModelCard(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        return [f"README.md has unreadable metadata: {' '.join(str(error).split())}"]
    expected = ModelCard(render_card(folder, card.data.get("model_name") or folder.resolve().name))
    table = metric_table(read_reports(folder).values())
    return [
        *metadata_problems(card.data.to_dict(), expected.data.to_dict()),
        *number_problems(card.text, expected.text),
        *(
            []
            if table in card.text
            else ["the table of measurements is not that of reports/: run isic-vq card write"]
        ),
        *link_problems(card.text, folder),
        *picture_problems(folder),
    ]


def metadata_problems(found: dict[str, Any], expected: dict[str, Any]) -> Iterator[str]:
    """Compare the metadata, the model-index number by number."""
    if not found:
        yield "README.md has no metadata between --- lines at its start: run isic-vq card write"
        return
    for key in KEYS:
        if key not in found:
            yield f"{key} is missing: expected {expected[key]!r}"
        elif found[key] != expected[key]:
            yield f"{key} is {found[key]!r}: expected {expected[key]!r}"
    if lacking := [tag for tag in expected["tags"] if tag not in (found.get("tags") or [])]:
        yield f"tags lack {', '.join(lacking)}"
    if "model-index" not in found:
        yield "model-index is missing: run isic-vq card write"
        return
    (found_index,), (expected_index,) = found["model-index"], expected["model-index"]
    published, measured = index_values(found["model-index"]), index_values(expected["model-index"])
    for place in sorted(measured.keys() | published.keys(), key=str):
        if place not in published:
            yield f"model-index lacks {' '.join(place)}, which a report has"
        elif place not in measured:
            yield f"model-index has {' '.join(place)}, which is in no report"
        elif type(published[place]) not in (int, float) or published[place] != measured[place]:
            yield f"model-index says {' '.join(place)} is {published[place]!r}: the report says {measured[place]!r}"
    if published == measured and found_index["results"] != expected_index["results"]:
        yield "model-index has the reports' values under other names: run isic-vq card write"


def index_values(model_index: list[dict[str, Any]]) -> dict[tuple[str, ...], Any]:
    """Values of a model-index by data set, split, metric and what else of `MEASURED_ON` is told."""
    return {
        (
            str(result["dataset"].get("name")),
            str(result["dataset"].get("split")),
            str(metric["type"]),
            *(
                f"{key}={value}"
                for key, value in sorted(metric.get("args", {}).items())
                if key in MEASURED_ON
            ),
        ): metric["value"]
        for model in model_index
        for result in model["results"]
        for metric in result["metrics"]
    }


def number_problems(text: str, expected: str) -> Iterator[str]:
    """Name the numbers of lines that the renderer does not write; names with digits that it uses (HAM10000) are none."""
    rendered = {line.strip() for line in expected.splitlines()}
    known, names = set(numbers(expected)), {*NAME.findall(expected), *DATASET_TITLES.values()}
    lines = [line.strip() for line in text.splitlines()]
    for line in dict.fromkeys(line for line in lines if line not in rendered):
        for number in numbers(NAME.sub(lambda name: "" if name[0] in names else name[0], line)):
            if number in known:
                yield f"{number} stands in a line that isic-vq card write does not write: {line[:60]!r}"
            else:
                yield f"{number} is in the card but in no report"


def numbers(text: str) -> list[str]:
    """Numbers of a text as they are written, each once."""
    return list(dict.fromkeys(found.rstrip(".,_*") for found in NUMBER.findall(text)))


def link_problems(text: str, folder: Path) -> Iterator[str]:
    """Name local links to what is not a file of the folder."""
    for match in LINK.finditer(CODE_BLOCK.sub("", text)):
        target = unquote((match[1] or match[2]).partition("#")[0])
        if not target or re.match(r"[a-z]+:", target):
            continue
        if target.startswith("/") or ".." in target.split("/"):
            yield f"{target} is linked but lies outside the folder"
        elif not (folder / target).is_file():
            yield f"{target} is linked but is not there"
        elif re.search(r"\.(jpe?g|gif|webp|bmp|tiff?)$", target, re.IGNORECASE):
            yield f"{target} is linked but is not a PNG that isic-vq wrote"


def picture_problems(folder: Path) -> Iterator[str]:
    """Name pictures that do not say that isic-vq made them, and of what."""
    for name in PICTURE_FOLDERS:
        for path in sorted((folder / name).glob("*")):
            place = f"{name}/{path.name}"
            if path.suffix != ".png":
                yield f"{place} is not a PNG that isic-vq wrote"
                continue
            try:
                check_picture(path)
            except ModelError as error:
                yield f"{place} {str(error).removeprefix(f'{path} ')}"
