"""Write what the documentation says of results from the reports.

    python docs/build.py

That is docs/results.md with its plots, and what stands between marks in README.md and docs/codec.md. Reads the reports beside the
shipped checkpoint and of the codec's benchmark; computes nothing.
"""

from pathlib import Path

from isic_vq.card import audit_verdict, measured_on, metric_cell, read_reports, topic_tables
from isic_vq.evaluation.report import Report
from isic_vq.figures.report_page import Plot, report_plots
from isic_vq.files import write_atomically
from isic_vq.studies.page import markdown_table

ROOT = Path(__file__).resolve().parents[1]
CODEC_REPORT = ROOT / "benchmarks" / "reports" / "codec.json"
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


def codec_section(report: Report) -> str:
    """The codec's bytes, what others need, and what coding takes."""
    (split,) = {metric.split for metric in report.metrics if metric.name == "psnr"}
    coders = {"prior": "by the prior", "unigram": "portable", "flat": "not coded"}
    columns = ("bytes_per_image", "code_bytes_per_image", "overhead_bytes_per_image")
    number = {metric.name: metric.n for metric in report.metrics}["psnr"]
    psnr, ssim = cells(report, ["psnr", "ssim"], [split])
    verdicts = {row["measured"]: row["verdict"] for row in report.tables["verdicts"]}
    rows = []
    for name in ("WebP", "AVIF", "JPEG"):
        for counted in ("whole files", "without headers"):
            needed, measured = f"bytes of {name} at equal PSNR, {counted}", f"psnr[prior] minus {name}'s at "
            (found,) = (key for key in verdicts if key.startswith(measured) and key.endswith(counted))
            rows.append([f"{name}, {counted}", *cells(report, [needed, found], [split]), verdicts[found]])
    values = {metric.name: metric_cell(metric) for metric in report.metrics}
    speed = [
        [
            f"{what}, {batch} at a time",
            *(values[f"images_per_second[{what}, {coder}, batch={batch}]"] for coder in ("prior", "static")),
        ]
        for what in ("encode", "decode")
        for batch in (1, 64)
    ]
    decoder = [
        [part, values[f"decoder_parameters[{part}]"], values[f"decoder_bytes[{part}]"]]
        for part in ("tokenizer's decoder and codebook", "prior")
    ]
    return "\n\n".join(
        [
            f"{number:,} held-out HAM10000 images at 128 pixels, the shipped checkpoint: PSNR {psnr} dB, SSIM {ssim}.",
            markdown_table(
                ["bytes per image", "in the file", "of it codes", "names, checksums, headers"],
                [
                    [title, *cells(report, [f"{name}[{coder}]" for name in columns], [split])]
                    for coder, title in coders.items()
                ],
            ),
            "Against these, coded by the prior (95 % intervals of the mean over images in brackets):",
            markdown_table(
                [
                    "",
                    "bytes it needs for equal PSNR",
                    "our PSNR minus its at equal or nearest bytes, dB",
                    "this codec",
                ],
                rows,
            ),
            f"Measured with: {measured_on([report])}. Images per second:",
            markdown_table(["", "by the prior", "portable"], speed),
            "What a decoder needs:",
            markdown_table(["", "parameters", "bytes"], decoder),
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


def fill(path: Path, section: str) -> None:
    """Put a text between the marks of a file."""
    before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    write_atomically(path, f"{before}{MARKS[0]}\n{section}\n{MARKS[1]}{after}".encode())


def main() -> None:
    """Write the files."""
    reports = read_reports(CHECKPOINT)
    plots = [plot for report in reports.values() for plot in report_plots(report)]
    for plot in plots:
        write_atomically(ROOT / "docs" / "figures" / f"{plot.name}.png", plot.content)
    write_atomically(ROOT / "docs" / "results.md", results_page(reports, plots).encode())
    fill(ROOT / "README.md", readme_section(reports))
    fill(ROOT / "docs" / "codec.md", codec_section(Report.load(CODEC_REPORT)))


if __name__ == "__main__":
    main()
