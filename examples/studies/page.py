"""A study's results as files: a report, plots, and a page of which every number is computed from the measurements."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isic_vq.evaluation.report import Metric, Report, environment
from isic_vq.evaluation.report_tables import markdown_table
from isic_vq.files import write_atomically
from measure import Difference

SMOKE = "SMOKE RUN: not a result"
LIMITS = (
    "Small models, trained for a few hundred steps on a CPU: what is said of settings compares them with each other, and need not "
    "hold for models trained to the end.",
    "Intervals are over images, which are treated as independent; HAM10000 has no patient ids. Seeds are few: a finding is stated "
    "only where the interval of every seed by itself lies on one side of zero. Nothing is corrected for the number of comparisons.",
)


@dataclass
class StudyPage:
    """What a study found.

    Attributes:
        name: of the study: its script is `examples/studies/NAME.py`.
        metrics: every number, one line per model and seed.
        tables: heading and Markdown table, in order.
        figures: file name without suffix, caption and PNG.
        differences: what the sentences are drawn from, by name; with their intervals they are in the report alone.
    """

    name: str
    title: str
    question: str
    metrics: list[Metric] = field(default_factory=list)
    tables: list[tuple[str, str]] = field(default_factory=list)
    figures: list[tuple[str, str, bytes]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    differences: dict[str, Difference] = field(default_factory=dict)
    smoke: bool = False

    def write(self, folder: Path) -> list[Path]:
        """Write `report.json`, the plots and `README.md` into a folder.

        Raises:
            ValueError: a smoke run among the documentation.
        """
        check_folder(folder, self.smoke)
        report = Report(
            {"study": self.name, "smoke": self.smoke},
            self.metrics,
            {
                "findings": self.findings,
                "differences": {
                    name: {"means": of.means, "intervals": [list(interval) for interval in of.intervals]}
                    for name, of in self.differences.items()
                },
            },
            environment(),
        )
        report.save(folder / "report.json")
        written = [folder / "report.json"]
        for name, _, content in self.figures:
            written.append(folder / f"{name}.png")
            write_atomically(written[-1], content)
        written.append(folder / "README.md")
        write_atomically(written[-1], self.text(report).encode())
        return written

    def text(self, report: Report) -> str:
        """The page as Markdown."""
        machine = report.environment
        parts = [
            f"# {self.title}" + (f" ({SMOKE})" if self.smoke else ""),
            self.question,
            f"Written by `python examples/studies/{self.name}.py examples/configs/{self.name}.yaml` from what it measured "
            f"([report.json](report.json)), with torch {machine['torch']} on {machine['device']}.",
            "## Findings",
            "\n".join(f"- {finding}" for finding in self.findings),
        ]
        for heading, table in self.tables:
            parts += [f"## {heading}", table]
        for name, caption, _ in self.figures:
            parts += [f"![{caption}]({name}.png)", f"*{caption}*"]
        parts += ["## Limits", "\n".join(f"- {limit}" for limit in LIMITS)]
        return "\n\n".join(parts) + "\n"


def check_folder(folder: Path, smoke: bool) -> None:
    """Raise ValueError for a smoke run whose results would lie among the documentation."""
    if smoke and "docs" in folder.resolve().parts:
        raise ValueError(
            f"{folder} is documentation: a smoke run is no result, write it elsewhere with --out"
        )


def recipe_table(vqvae: dict[str, Any], prior: dict[str, Any]) -> str:
    """How long all tokenizers and all priors were trained."""
    keys = ("max_steps", "batch_size", "learning_rate")
    rows = [
        [part, *(str(stage["loop"][key]) for key in keys)]
        for part, stage in (("tokenizer", vqvae), ("prior", prior))
    ]
    return markdown_table(["", "steps", "images per step", "learning rate"], rows)


def over_seeds(values: Sequence[float], digits: int) -> str:
    """The mean over seeds, and each seed's own in brackets."""
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{sum(values) / len(values):.{digits}f} ({each})"
