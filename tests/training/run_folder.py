"""What a run leaves in its folder, in a form that two runs can be compared by."""

import hashlib
import json
from pathlib import Path
from typing import Any

TIMED = ("images_per_second", "data_seconds", "compute_seconds", "memory_gib")


def records(run_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without what differs from run to run by nature."""
    return [{k: v for k, v in line.items() if not k.endswith(TIMED)} for line in lines]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def scalars(lines: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """Every number of the records by the name and step under which trackers know it."""
    return {
        (f"{line['kind']}/{name}", line["step"]): value
        for line in lines
        for name, value in line.items()
        if name not in ("kind", "step", "epoch")
    }
