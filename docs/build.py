"""Write what the documentation says of results and of commands.

    python docs/build.py

That is docs/results.md with its plots, docs/cli.md, docs/classes.png, what stands between marks in README.md and in pages of docs/,
and the VAR's comparison.md, which its card links. Reads the checkpoints' reports and those of benchmarks; computes nothing.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

from cli_page import cli_page
from front_page import (
    YARDSTICK,
    class_picture,
    models_table,
    read_json,
    results_table,
    sampling_table,
    unusual_images_table,
)
from isic_vq.evaluation.report import Metric, Report
from isic_vq.evaluation.report_tables import markdown_table, number_text, report_tables
from isic_vq.figures.png import png_content
from isic_vq.figures.report_page import Plot, report_plots
from isic_vq.files import write_atomically
from isic_vq.hub.card import (
    COMPARISON,
    as_text,
    audit_verdict,
    column_title,
    history,
    measured_on,
    metric_cell,
    read_provenance,
    read_reports,
    seeds_of,
)
from utility_page import utility_sections

ROOT = Path(__file__).resolve().parents[1]
CODEC_REPORT = ROOT / "benchmarks" / "reports" / "codec.json"
SAMPLING_REPORT = ROOT / "benchmarks" / "reports" / "sampling.json"
UNUSUAL_REPORT = ROOT / "examples" / "reports" / "ood-isic-vq-128.json"
VAR_SAMPLING_REPORT = ROOT / "benchmarks" / "reports" / "sampling-var.json"
NEXT_SCALE_REPORT = ROOT / "benchmarks" / "reports" / "next_scale.json"
CHECKPOINT = ROOT / "model_cards" / "isic-vq-128"
VAR_CHECKPOINT = ROOT / "model_cards" / "isic-vq-128-var"
LEADERBOARD = ROOT / "docs" / "leaderboard.json"
SETS = {"validation": "HAM10000, held-out files", "uda1": "UDA-1, another source"}
COMPARED = {"floor": "other real images", "reconstructions": "reconstructions", "samples": "samples"}


def codec_section(report: Report) -> str:
    """The codec's bytes, what others need, and what coding takes."""
    coders = {"prior": "by the prior", "unigram": "portable", "flat": "not coded"}
    columns = ("bytes_per_image", "code_bytes_per_image", "overhead_bytes_per_image")
    psnr, ssim = report.find("psnr"), report.find("ssim")
    verdicts = {row["measured"]: row["verdict"] for row in report.tables["verdicts"]}
    rows = []
    for name in ("WebP", "AVIF", "JPEG"):
        for counted in ("whole files", "without headers"):
            labels = {"codec": name, "counted": counted}
            needed = report.find("bytes_at_equal_psnr", **labels)
            (gain,) = (
                m
                for m in report.metrics
                if m.name == "psnr_difference" and m.labels.items() >= (labels | {"coder": "prior"}).items()
            )
            rows.append([f"{name}, {counted}", metric_cell(needed), metric_cell(gain), verdicts[gain.text]])
    speed = [
        [
            f"{what}, {batch} at a time",
            *(
                metric_cell(report.find("images_per_second", action=what, coder=coder, batch=str(batch)))
                for coder in ("prior", "static")
            ),
        ]
        for what in ("encode", "decode")
        for batch in (1, 64)
    ]
    decoder = [
        [part, *(metric_cell(report.find(f"decoder_{what}", part=part)) for what in ("parameters", "bytes"))]
        for part in ("tokenizer's decoder and codebook", "prior")
    ]
    return "\n\n".join(
        [
            f"{psnr.n:,} held-out HAM10000 images at 128 pixels, the shipped checkpoint: PSNR {metric_cell(psnr)} dB, SSIM "
            f"{metric_cell(ssim)}.",
            markdown_table(
                ["bytes per image", "in the file", "of it codes", "names, checksums, headers"],
                [
                    [title, *(metric_cell(report.find(name, coder=coder)) for name in columns)]
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


def better(metrics: tuple[Metric, Metric], most: bool) -> str:
    """Which of two measured numbers is the better one, if their intervals let it be said."""
    intervals = [metric.interval for metric in metrics]
    first, second = (metric.value for metric in metrics)
    if None not in intervals:
        (low, high), (other_low, other_high) = intervals
        if low <= other_high and other_low <= high:
            return "intervals overlap"
    return "VAR" if (first > second) == most else "PixelCNN"


def comparison(folders: tuple[Path, Path], speed: dict[str, Any]) -> str:
    """A VAR beside a PixelCNN: what each costs and what it is worth, row by row.

    Args:
        folders: repositories of the VAR and of the PixelCNN.
        speed: the report of benchmarks/next_scale.py, of the same two.
    """
    found = [read_reports(folder)["evaluation.json"] for folder in folders]
    origins = [read_provenance(folder) for folder in folders]
    rows = []

    def measured(title: str, name: str, split: str, most: bool, **labels: str) -> None:
        metrics = tuple(report.find(name, split, **labels) for report in found)
        rows.append([title, *map(metric_cell, metrics), better(metrics, most)])

    def told(title: str, values: list[float]) -> None:
        rows.append([title, *map(number_text, values), "VAR" if values[0] < values[1] else "PixelCNN"])

    told(
        "bits per image, codes stored as they are",
        [8 * report.value("bytes_per_image_flat") for report in found],
    )
    told(
        "bits per image, coded by the prior", [8 * report.value("bytes_per_image_prior") for report in found]
    )
    measured("bits per pixel, coded by the prior", "bits_per_pixel", "validation", False)
    for split, title in SETS.items():
        measured(f"reconstruction, PSNR in dB, {title}", "psnr", split, True)
        measured(f"reconstruction, SSIM, {title}", "ssim", split, True)
    for yardstick in found[0].tables["generation"]["yardsticks"]:
        for distance, title in (
            ("frechet_distance", "Frechet distance"),
            ("kernel_distance", "kernel distance"),
        ):
            for kind, what in COMPARED.items():
                labels = {"images": kind, "yardstick": yardstick}
                measured(f"{title}, {yardstick}: {what}", distance, "validation", False, **labels)
            rows[-3][-1] = "the same images"
    names = ("VAR, images", "PixelCNN, compiled, images")
    races = {race["batch"]: race for race in speed["races"]}
    for batch in (1, 64):
        seconds = [races[batch]["contestants"][name]["seconds_per_image"] for name in names]
        told(f"seconds per image, {batch} at a time", seconds)
    operations = speed["gflops_per_image"]
    told(
        "GFLOP per image, noise to pixels, without guidance",
        [
            operations["VAR"] + operations["decoding, VAR"],
            operations["PixelCNN, eager"] + operations["decoding, PixelCNN"],
        ],
    )
    for part in ("prior", "vqvae"):
        told(
            f"parameters, {part}",
            [report.value("parameters", part=part) for report in found],
        )
    for part, title in (("vqvae", "tokenizer"), ("prior", "prior")):
        told(
            f"training, {title}, PFLOP",
            [speed["training_pflop"][name][part] for name in ("VAR", "PixelCNN")],
        )
        runs = [history(origin["training"][part]) for origin in origins]
        told(
            f"training, {title}, hours in steps",
            [sum(r["hours"] for r in stages) for stages in runs],
        )
        told(
            f"training, {title}, optimizer steps",
            [sum(r["steps"] for r in stages) for stages in runs],
        )
    weights = [origin["training"]["vqvae"]["recipe"].get("ssim_weight", 0) for origin in origins]
    rows.append(
        ["weight of SSIM in the tokenizer's loss", *(f"{weight:g}" for weight in weights), "recipes differ"]
    )
    machine = origins[0]["training"]["prior"]["environment"]
    return "\n\n".join(
        [
            f"Compared with `{folders[1].name}`, which has a PixelCNN over one grid. Both were trained on the same images on "
            f"{machine['cores']} CPU cores ({machine['device']}), and measured on the same ones. The numbers in brackets are "
            "95 % intervals; where two of them overlap, neither model is called the better one. Seed of random choices: "
            f"{seeds_of(m for report in found for m in report.metrics)}. Reconstructions are what perfect priors "
            "would reach: the ceiling; other real images are the floor.",
            markdown_table(["", "VAR", "PixelCNN", "better or cheaper"], rows),
        ]
    )


def speed_section(speed: dict[str, Any]) -> str:
    """Seconds and operations of drawing codes, by batch size."""
    races, operations = speed["races"], speed["gflops_per_image"]
    codes = ["VAR", "raster transformer, cached", "PixelCNN, eager", "PixelCNN, compiled"]
    table = markdown_table(
        [
            "milliseconds per image, codes alone",
            *(f"{race['batch']} at a time" for race in races),
            "GFLOP per image",
        ],
        [
            [
                name,
                *(f"{1000 * race['contestants'][name]['seconds_per_image']:.3g}" for race in races),
                f"{operations[name]:.3g}" if name in operations else "as eager",
            ]
            for name in codes
        ],
    )
    times = markdown_table(
        ["times as fast, median of rounds (quartiles)", *(f"{race['batch']} at a time" for race in races)],
        [
            [
                name,
                *(
                    "{:.3g} ({:.3g} to {:.3g})".format(row["median"], *row["quartiles"])
                    for row in (race["figures"][name] for race in races)
                ),
            ]
            for name in races[0]["figures"]
        ],
    )
    return f"{table}\n\n{times}"


def settings_section(report: Report) -> str:
    """Samples by how codes are drawn, from a report of `examples/studies/sampling_study.py`."""
    measures = {
        "frechet_distance": ("Frechet distance", {}),
        "recall": ("recall", {}),
        "agreement": ("agreement on melanoma", {"diagnosis": "melanoma"}),
    }
    spaces = sorted({metric.labels["yardstick"] for metric in report.metrics})
    drawn = [
        {
            m.labels["images"]: m
            for m in report.metrics
            if m.name == name and m.labels == {**labels, "images": m.labels["images"], "yardstick": space}
        }
        for name, (_, labels) in measures.items()
        for space in spaces
    ]
    rows = [[images, *(metric_cell(column[images]) for column in drawn)] for images in drawn[0]]
    heads = [f"{title}, {space}" for title, _ in measures.values() for space in spaces]
    return markdown_table(["settings", *heads], rows)


def next_scale_section() -> str:
    """The comparison, how settings change samples, and how fast codes are drawn."""
    speed = read_json(NEXT_SCALE_REPORT)
    sampling = Report.load(VAR_SAMPLING_REPORT)
    return "\n\n".join(
        [
            comparison((VAR_CHECKPOINT, CHECKPOINT), speed),
            f"Samples of the VAR by how its codes are drawn, seed {seeds_of(sampling.metrics)} (`plain`: temperature 1, no guidance):",
            settings_section(sampling),
            "How fast codes are drawn without guidance, and images by each checkpoint's own settings:",
            speed_section(speed),
        ]
    )


def results_page(reports: dict[str, Report], plots: list[Plot]) -> str:
    """Every metric of whole data sets, and plots of parts of them, topic by topic."""
    metrics = [metric for report in reports.values() for metric in report.metrics]
    parts = [
        "# Results of isic-vq-128",
        "Written by `python docs/build.py` from the [reports](../model_cards/isic-vq-128/reports), which also hold the numbers of "
        "diagnoses, sources, sexes and body sites. The names and the commands are explained in [Evaluation](evaluation.md).",
        f"Measured with: {measured_on(reports.values())}. In brackets: 95 % intervals, which treat images as independent. "
        f"Seed of random choices: {seeds_of(metrics)}.",
    ]
    for table in report_tables(metrics, column_title):
        parts.append(f"## {table.title}")
        if table.title == "Memorisation":
            parts.append(str(audit_verdict(reports)))
        rows = []
        for (name, unit), row in table.rows.items():
            cells = (metric_cell(row[column]) if column in row else "" for column in table.columns)
            rows.append([as_text(name), unit, *cells])
        parts.append(markdown_table(["metric", "unit", *table.columns], rows, texts=2))
        parts += [
            f"![{plot.caption}](figures/{plot.name}.png)" for plot in plots if plot.topic == table.title
        ]
    return "\n\n".join(parts) + "\n"


def leaderboard(folders: tuple[Path, ...]) -> list[dict[str, Any]]:
    """All measured models so far, each with what its training took; the shipped ones are added once measured anew."""
    rows: list[dict[str, Any]] = json.loads(LEADERBOARD.read_text(encoding="utf-8"))
    for folder in folders:
        report, training = read_reports(folder)["evaluation.json"], read_provenance(folder)["training"]
        stages = [stage for record in training.values() for stage in history(record)]
        row = {
            "model": folder.name,
            "recipes": [Path(stage["recipe"]["output_dir"]).name for stage in stages],
            "core_minutes": round(60 * sum(s["hours"] * s["environment"]["threads"] for s in stages)),
            "commit": report.environment["git_commit"],
            "n": report.find("frechet_distance", images="samples", yardstick=YARDSTICK).n,
            "frechet_distance": {
                yardstick: [distance.value, *(distance.interval or [])]
                for yardstick in report.tables["generation"]["yardsticks"]
                for distance in [report.find("frechet_distance", images="samples", yardstick=yardstick)]
            },
        }
        if all(known["model"] != row["model"] or known["commit"] != row["commit"] for known in rows):
            command = ["git", "show", "-s", "--format=%cs", row["commit"]]
            date = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            rows.append({"date": date, **row})
    return rows


def leaderboard_page(rows: list[dict[str, Any]]) -> str:
    """The leaderboard as a page, the smallest distance first."""
    yardsticks = sorted(rows[0]["frechet_distance"], key=lambda name: name != YARDSTICK)
    ranked = sorted(rows, key=lambda row: row["frechet_distance"][YARDSTICK][0])
    return (
        "\n\n".join(
            [
                "# Leaderboard",
                "How many minutes of one CPU core a model's trainings took, and how far its samples are from real images. Written by `python docs/build.py`; "
                "a row is added for a shipped model whenever it is measured again, and rows of earlier models stay. Minutes are those in optimizer steps at the median "
                "pace, times the threads. Distances: Frechet, to the validation images of HAM10000, of as many samples of the same diagnoses, "
                "with 95 % intervals; isic-derm-features is the space that decoders were trained in. What did not work is in "
                "[LOG.md](../LOG.md) and in the [ablations' reports](../benchmarks/reports).",
                markdown_table(
                    [
                        "date",
                        "commit",
                        "model",
                        "recipes, in `examples/configs`",
                        "core minutes",
                        "n",
                        *yardsticks,
                    ],
                    [
                        [
                            row["date"],
                            f"`{row['commit']:.7}`",
                            row["model"],
                            ", ".join(row["recipes"]),
                            f"{row['core_minutes']:,}",
                            f"{row['n']:,}",
                            *(
                                "{:.2f} ({:.2f} to {:.2f})".format(*row["frechet_distance"][yardstick])
                                for yardstick in yardsticks
                            ),
                        ]
                        for row in ranked
                    ],
                    texts=4,
                ),
            ]
        )
        + "\n"
    )


def sections() -> dict[tuple[str, str], str]:
    """What stands between marks, by file and mark."""
    reports = read_reports(CHECKPOINT)
    return {
        ("README.md", "models"): models_table((CHECKPOINT, VAR_CHECKPOINT)),
        ("README.md", "results"): results_table(reports),
        ("docs/sampling.md", "speed"): sampling_table(read_json(SAMPLING_REPORT)["races"]),
        ("docs/evaluation.md", "unusual"): unusual_images_table(Report.load(UNUSUAL_REPORT)),
        ("docs/codec.md", "results"): codec_section(Report.load(CODEC_REPORT)),
        ("docs/next-scale.md", "results"): next_scale_section(),
        **{("docs/utility.md", mark): section for mark, section in utility_sections().items()},
    }


def marked(text: str, mark: str) -> tuple[str, str, str]:
    """A text before, between and after the marks of a name."""
    before, rest = text.split(f"<!-- {mark} -->\n")
    between, after = rest.split(f"<!-- /{mark} -->")
    return before, between, after


def fill(path: Path, mark: str, section: str) -> None:
    """Put a text between the marks of a file."""
    before, _, after = marked(path.read_text(encoding="utf-8"), mark)
    write_atomically(path, f"{before}<!-- {mark} -->\n{section}\n<!-- /{mark} -->{after}".encode())


def main() -> None:
    """Write the files."""
    reports = read_reports(CHECKPOINT)
    plots = [plot for report in reports.values() for plot in report_plots(report)]
    for plot in plots:
        write_atomically(ROOT / "docs" / "figures" / f"{plot.name}.png", plot.content)
    write_atomically(ROOT / "docs" / "results.md", results_page(reports, plots).encode())
    rows = leaderboard((CHECKPOINT, VAR_CHECKPOINT))
    write_atomically(LEADERBOARD, (json.dumps(rows, indent=2) + "\n").encode())
    write_atomically(ROOT / "docs" / "leaderboard.md", leaderboard_page(rows).encode())
    write_atomically(ROOT / "docs" / "cli.md", cli_page().encode())
    about = {"Description": f"Generated by {CHECKPOINT.name}"}
    write_atomically(ROOT / "docs" / "classes.png", png_content(class_picture(CHECKPOINT), about))
    for (name, mark), section in sections().items():
        fill(ROOT / name, mark, section)
    speed = read_json(NEXT_SCALE_REPORT)
    write_atomically(
        VAR_CHECKPOINT / COMPARISON, f"{comparison((VAR_CHECKPOINT, CHECKPOINT), speed)}\n".encode()
    )


if __name__ == "__main__":
    main()
