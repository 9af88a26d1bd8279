"""Tables that describe images, read strictly: CSV of any common delimiter, and JSON lines.

Column names are compared without case and outer blanks. Ambiguous content is an error with file, row and column; all
wrong rows are reported together. The parser is the standard library's in strict mode, because pandas (3.1) accepts rows
that are too short or too long and duplicate columns, and pyarrow accepts an unclosed quote.
"""

import codecs
import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from isic_vq.data.classes import NUM_LISTED, and_more
from isic_vq.data.errors import DataError

CSV_SUFFIXES = (".csv", ".tsv", ".tab")
TABLE_SUFFIXES = (*CSV_SUFFIXES, ".jsonl")
DELIMITERS = ",;\t|"
MAX_CELL = 1 << 24  # characters


def is_table(name: str) -> bool:
    """Whether a file has the suffix of a table."""
    return PurePosixPath(name).suffix.lower() in TABLE_SUFFIXES


def read_table(content: bytes, name: str, header: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read the rows of a table, with column names in lower case; values of a CSV are text.

    UTF-8 or, with its mark, UTF-16; the suffix of the name tells JSON lines from CSV, whose header may be given. DataError
    for a duplicate column, an unclosed quote, or a row that is not as the header.
    """
    text = _decoded(content, name)
    if PurePosixPath(name).suffix.lower() == ".jsonl":
        rows = _json_rows(text, name)
    else:
        rows = _csv_rows(text, name, header)
    if not rows:
        raise DataError(f"{name} has no rows: expected one row per image")
    return rows


def raise_together(problems: Sequence[str], name: str) -> None:
    """Raise one DataError for all rows that cannot be used, if any: the first ones, and their number."""
    if len(problems) == 1:
        raise DataError(problems[0])
    if problems:
        listed = " | ".join(problems[:NUM_LISTED]) + and_more(len(problems))
        raise DataError(f"{name}: {len(problems)} rows cannot be used: {listed}")


def _decoded(content: bytes, name: str) -> str:
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{name} is not UTF-8 text (line {line}): save it as CSV UTF-8") from error
    if "\0" in text:
        raise DataError(f"{name} holds the character NUL: expected text, in UTF-8 or in UTF-16 with its mark")
    return text


def _csv_rows(text: str, name: str, header: Sequence[str] | None) -> list[dict[str, Any]]:
    first = text.lstrip("\r\n").partition("\n")[0]
    is_tab = PurePosixPath(name).suffix.lower() in (".tsv", ".tab")
    delimiter = "\t" if is_tab else max(DELIMITERS, key=first.count)  # the first of equals: a comma
    cells = iter(_csv_cells(text, name, delimiter))
    columns = _columns(header or next(filter(any, cells), []), name)
    rows: list[dict[str, Any]] = []
    problems = []
    for row in (row for row in cells if any(cell.strip() for cell in row)):
        where = f"{name}, row {len(rows)}"
        rows.append(dict(zip(columns, row, strict=False)))
        if len(row) > len(columns):
            extra = row[len(columns)]
            problems.append(f"{where} has {len(row)} cells, the header {len(columns)}: {extra[:40]!r} is in no column; "
                            f"put text with {delimiter!r} in it in quotes")  # fmt: skip
        elif len(row) < len(columns):
            problems.append(f"{where} has {len(row)} cells, the header {len(columns)}: it ends before the column "
                            f"{columns[len(row)]}")  # fmt: skip
    raise_together(problems, name)
    return rows


def _csv_cells(text: str, name: str, delimiter: str) -> list[list[str]]:
    limit = csv.field_size_limit(MAX_CELL)  # of the whole process, so that it is set back
    rows: list[list[str]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1  # the row's first one, as cells may hold line breaks
    try:
        for row in reader:
            rows.append(row)
            line = reader.line_num + 1
    except csv.Error as error:
        row_number = f"row {len(rows) - 1}, " if rows else ""
        raise DataError(
            f"{name}, {row_number}line {line}: {error}. Expected each quote to be closed in its cell, and doubled inside"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _columns(header: Sequence[str], name: str) -> list[str]:
    columns = [column.strip().lower() for column in header]
    twice = [column for column, number in Counter(columns).items() if number > 1 and column]
    if twice:
        raise DataError(f"{name} has the column {' and '.join(twice)} twice: keep one of them")
    return columns


def _json_rows(text: str, name: str) -> list[dict[str, Any]]:
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(dict(zip(_columns(list(row), where), row.values(), strict=True)))
            else:
                problems.append(f"{where} is a {type(row).__name__}; expected one object per line.")
        except (json.JSONDecodeError, RecursionError) as error:
            problems.append(f"{where} is not JSON: {error}. Expected one object per line.")
    raise_together(problems, name)
    return rows
