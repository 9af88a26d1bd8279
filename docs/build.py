"""Write what the documentation says of results from the reports: docs/results.md, its plots, and the README's section.

    python docs/build.py

Reads the reports beside the shipped checkpoint; computes nothing.
"""

from pathlib import Path

from isic_vq.card import audit_verdict, measured_on, metric_cell, read_reports, topic_tables
from isic_vq.evaluation.report import Report
from isic_vq.figures.report_page import Plot, report_plots
from isic_vq.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "model_cards" / "isic-vq-128"
MARKS = "<!-- results -->", "<!-- /results -->"
SETS = {"validation": "HAM10000, held-out files", "uda1": "UDA-1, another source"}
LINES = {
    "psnr": "reconstruction, PSNR in dB",
    "ssim": "reconstruction, SSIM",
    "perplexity": "codes in use, perplexity",
    "bits_per_code": "prior, bits per code given the diagnosis",
    "bits_per_code_unigram": "the same by the codes' frequencies in training",
    "conditioning_gain": "what the diagnosis saves, bits per image",
}
COMPARED = {"floor": "other real images", "reconstructions": "reconstructions", "samples": "samples"}
ARMS = {"real": "real images", "synthetic": "generated images", "real+synthetic": "both"}


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def cells(report: Report, names: list[str], splits: list[str]) -> list[str]:
    """The values of metrics, by name and then by split; every one of them is there."""
    found = {(metric.name, metric.split): metric for metric in report.metrics}
    return [metric_cell(found[name, split]) for name in names for split in splits]


def readme_section(reports: dict[str, Report]) -> str:
    """What matters most, with intervals."""
    evaluation, utility = reports["evaluation.json"], reports["utility.json"]
    head = [f"{title} (n = {evaluation.tables[key]['data']['num_images']:,})" for key, title in SETS.items()]
    yardsticks = evaluation.tables["generation"]["yardsticks"]
    measures = {"balanced_accuracy": "balanced accuracy", "melanoma_auc": "AUC of melanoma"}
    return "\n\n".join(
        [
            markdown_table(
                ["", *head],
                [[title, *cells(evaluation, [name], list(SETS))] for name, title in LINES.items()],
            ),
            "Generated images, as many as the held-out files have and of the same diagnoses: Frechet distance to those, beside "
            "what other real images and perfect use of the tokenizer reach.",
            markdown_table(
                ["features of", *COMPARED.values()],
                [
                    [
                        yardstick,
                        *cells(
                            evaluation,
                            [f"frechet_distance[{kind}, {yardstick}]" for kind in COMPARED],
                            ["validation"],
                        ),
                    ]
                    for yardstick in yardsticks
                ],
            ),
            "A small classifier, tested on the held-out files:",
            markdown_table(
                ["trained on", *measures.values()],
                [
                    [title, *cells(utility, [f"{measure}[{arm}]" for measure in measures], ["validation"])]
                    for arm, title in ARMS.items()
                ],
            ),
            f"Memorisation: {audit_verdict(reports)}",
        ]
    )


def results_page(reports: dict[str, Report], plots: list[Plot]) -> str:
    """Every metric of whole data sets, and plots of parts of them, topic by topic."""
    parts = [
        "# Results of isic-vq-128",
        "Written by `python docs/build.py` from the [reports](../model_cards/isic-vq-128/reports), which hold the numbers of "
        "diagnoses, sources, sexes and body sites, too. What the names mean, and the commands: "
        "[evaluation.md](evaluation.md).",
        f"Measured with: {measured_on(reports.values())}. In brackets: 95 % intervals, which treat images as independent.",
    ]
    for topic, table in topic_tables(reports.values()).items():
        parts.append(f"## {topic}")
        if topic == "Memorisation":
            parts.append(str(audit_verdict(reports)))
        parts.append(table)
        parts += [f"![{plot.caption}](figures/{plot.name}.png)" for plot in plots if plot.topic == topic]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the files."""
    reports = read_reports(CHECKPOINT)
    plots = [plot for report in reports.values() for plot in report_plots(report)]
    for plot in plots:
        write_atomically(ROOT / "docs" / "figures" / f"{plot.name}.png", plot.content)
    write_atomically(ROOT / "docs" / "results.md", results_page(reports, plots).encode())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = readme.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    section = f"{MARKS[0]}\n{readme_section(reports)}\n{MARKS[1]}"
    write_atomically(ROOT / "README.md", f"{before}{section}{after}".encode())


if __name__ == "__main__":
    main()
