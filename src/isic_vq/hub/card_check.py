"""Check a model card by rendering it again.

Prose may be written by hand, numbers may not: a line with a number, in code too, must be one that
`isic_vq.hub.card.render_card` writes for the folder, and the metadata and the tables of measurements must be as it
writes them; there may be more tags. Linked files must be there, and pictures must say that isic-vq made them: others
may be of patients.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import CardData, EvalResult, ModelCard

from isic_vq.hub.card import DATASET_TITLES, known_metrics, known_table, read_reports, render_card
from isic_vq.hub.layout import check_picture, read_card
from isic_vq.hub.pretrained import ModelError

CODE_BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|(?:src|href)=[\"']([^\"']+)")
NAME = re.compile(r"[A-Za-z][\w-]*\d[\w-]*")


def check_card(folder: Path) -> list[str]:
    """List the problems of a repository folder's README.md, a line each; raises as `render_card` does."""
    path = folder / "README.md"
    if not path.is_file():
        return ["README.md is missing: run isic-vq card"]
    try:
        card = read_card(path)
    except ModelError as error:
        return [str(error)]
    expected = ModelCard(render_card(folder, card.data.get("model_name") or folder.resolve().name))
    problems = [*metadata_problems(card.data, expected.data), *number_problems(card.text, expected.text)]
    if known_table(known_metrics(read_reports(folder).values())) not in card.text:
        problems.append("the table of measurements is not that of reports/: run isic-vq card")
    return [*problems, *link_problems(card.text, folder), *picture_problems(folder)]


def metadata_problems(metadata: CardData, expected: CardData) -> Iterator[str]:
    """Compare the metadata, the model-index result by result."""
    fields, wanted = metadata.to_dict(), expected.to_dict()
    if not fields:
        yield "README.md has no metadata between --- lines at its start: run isic-vq card"
        return
    fields["tags"] = [tag for tag in wanted["tags"] if tag in (fields.get("tags") or [])]
    for key in wanted.keys() - {"model-index"}:
        if fields.get(key) != wanted[key]:
            yield f"{key} is {fields.get(key)!r}: expected {wanted[key]!r}"
    published, measured = metadata.get("eval_results") or [], expected.get("eval_results") or []
    for result in published:
        if result not in measured:
            yield f"model-index says {_text(result)}, which no report does: run isic-vq card"
    for result in measured:
        if result not in published:
            yield f"model-index lacks {_text(result)}, which a report says: run isic-vq card"


def _text(result: EvalResult) -> str:
    name = result.metric_name or result.metric_type
    return f"that {name} is {result.metric_value!r} ({result.dataset_name}, {result.dataset_split})"


def number_problems(text: str, expected: str) -> Iterator[str]:
    """Name lines with numbers that the renderer does not write; names with digits that it uses (HAM10000) are none."""
    names = {*NAME.findall(expected), *DATASET_TITLES.values()}
    rendered = {line.strip() for line in expected.splitlines()}
    for line in dict.fromkeys(line.strip() for line in text.splitlines()):
        if line not in rendered and re.search(r"\d", NAME.sub(lambda n: "" if n[0] in names else n[0], line)):
            yield f"a number stands in a line that isic-vq card does not write: {line!r}"


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
    for path in sorted([*folder.glob("previews/*"), *folder.glob("figures/*")]):
        try:
            check_picture(path)
        except ModelError as error:
            yield str(error).removeprefix(f"{folder}/")
