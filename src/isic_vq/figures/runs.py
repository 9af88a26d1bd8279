"""Read the files of a training run: its log of metrics, its stage, its report and its arrays of images.

A run is a folder with a `metrics.jsonl`: one JSON object per line, `{"kind": "batch", "step", "epoch", "loss", ...}`
per optimizer step and `{"kind": "epoch", "step", "epoch", "train/loss", "validation/loss", ...}` per epoch. Beside it
lie `recipe.yaml` (key `stage`) and, once the run is evaluated, `report.json` and `arrays/*.safetensors`.

An optional part that is missing raises `MissingPartError`, which the caller reports; a broken one raises ValueError. Nothing
here draws or computes.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from isic_vq.evaluation.report import Report
from isic_vq.yaml_text import read_yaml

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
STAGES = ("vqvae", "prior", "decoder", "classifier")
KINDS = ("batch", "epoch")


class MissingPartError(Exception):
    """A run lacks an optional part; the message names it and the command that writes it."""


@dataclass(frozen=True)
class Run:
    """One training run on disk."""

    folder: Path

    @cached_property
    def stage(self) -> str:
        """What the run trains: one of `STAGES`."""
        path = self.folder / "recipe.yaml"
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: without its `stage` the run cannot be read; copy the recipe there"
            )
        recipe = read_yaml(path.read_text(encoding="utf-8"))
        stage = recipe.get("stage") if isinstance(recipe, dict) else None
        if stage not in STAGES:
            raise ValueError(f"{path}: stage must be one of {STAGES}, got {stage!r}")
        return stage

    @cached_property
    def metrics(self) -> dict[str, list[dict[str, Any]]]:
        return read_metrics(self.folder / METRICS_FILE)

    def records(self, kind: str, key: str) -> list[dict[str, Any]]:
        """Return the log's records of one kind, of which at least one has the key."""
        records = self.metrics[kind]
        if not any(key in record for record in records):
            raise MissingPartError(f"{self.folder / METRICS_FILE} has no {kind} record with {key!r}")
        return records

    def table(self, name: str) -> list[Any]:
        """Return a table of the run's report, a list."""
        path = self.folder / "report.json"
        if not path.is_file():
            raise MissingPartError(f"{path} is missing: evaluate the run first")
        tables = Report.load(path).tables
        if name not in tables:
            raise MissingPartError(
                f"{path} has no table {name!r}, only {sorted(tables)}: evaluate the run again"
            )
        if not isinstance(tables[name], list):
            raise ValueError(f"{path}: table {name!r} must be a list, got {type(tables[name]).__name__}")
        return tables[name]

    def arrays(self, name: str, *keys: str) -> list[np.ndarray]:
        """Return tensors of `arrays/<name>.safetensors`."""
        path = self.folder / "arrays" / f"{name}.safetensors"
        if not path.is_file():
            raise MissingPartError(f"{path} is missing: evaluate the run first")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}): evaluate the run again") from error
        if absent := [key for key in keys if key not in tensors]:
            raise ValueError(f"{path} must hold {list(keys)}: missing {absent}, found {sorted(tensors)}")
        return [tensors[key] for key in keys]


def find_runs(folder: Path) -> list[Run]:
    """Return the run that a folder is, or the runs below it, by path.

    Raises:
        FileNotFoundError: There is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the folder that the training wrote to")
    if (folder / METRICS_FILE).is_file():
        return [Run(folder)]
    runs = [Run(path.parent) for path in sorted(folder.rglob(METRICS_FILE))]
    if not runs:
        raise FileNotFoundError(
            f"no {METRICS_FILE} in {folder} or below it: it holds no run; give the folder that the training wrote to"
        )
    return runs


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read a log of metrics: records by kind ("batch", "epoch"), in order of step.

    A resumed run repeats steps: of two records of one kind and step the later line holds. A last line that is not
    JSON, which a killed run leaves, is skipped with a warning in the log; so are records of other kinds.

    Raises:
        ValueError: Another line is broken; the message names file and line.
    """
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    by_step: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in KINDS}
    others: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:  # also of bytes that are not UTF-8
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}); repair or remove it"
                ) from error
            logger.warning("%s: skipped line %d, the last, which is only half written", path, number)
            continue
        check_record(record, f"{path}, line {number}")
        if record["kind"] in KINDS:
            by_step[record["kind"]][record["step"]] = record
        else:
            others[record["kind"]] += 1
    if others:
        logger.warning("%s: no figure shows these records: %s", path, dict(others))
    return {kind: [records[step] for step in sorted(records)] for kind, records in by_step.items()}


def check_record(record: Any, place: str) -> None:
    """Raise ValueError unless a record of the log has a kind, integer step and epoch, and numbers."""
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError(f"{place} must be a JSON object with a 'kind', got {record!r:.80}")
    if record["kind"] not in KINDS:
        return
    for key in ("step", "epoch"):
        if type(record.get(key)) is not int:
            raise ValueError(f"{place}: {key!r} must be an integer, got {record.get(key)!r}")
    for key in record:
        if (key == "loss" or key.endswith(("/loss", "_loss"))) and type(record[key]) not in (int, float):
            raise ValueError(f"{place}: {key!r} must be a number, got {record[key]!r}")
