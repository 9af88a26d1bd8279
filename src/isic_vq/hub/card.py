"""Render the model card of a repository folder from its files alone.

Numbers come from `reports/*.json`, `provenance.json` and the configs: what none of them holds cannot reach the card.
Text (`card_template.md`) and metadata have the metrics that people know (`KNOWN`), the model-index those of the data set
that has most of them; all others stay in `reports/`.

A report named `memorization.json` is the audit for memorised training images: its table `verdict` is the sentence
that the card shows. A file `comparison.md` is linked.
"""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image, UnidentifiedImageError

from isic_vq.data.licenses import weights_license
from isic_vq.data.provenance import BY_STAGE, licenses_of
from isic_vq.evaluation.report import Metric, Report
from isic_vq.evaluation.report_tables import markdown_table, rounded, topic_of
from isic_vq.files import MAX_PREVIEWS, preview_name, write_atomically
from isic_vq.hub.pretrained import read_object
from isic_vq.models.configuration_isic_vq import TASK, IsicVQConfig
from isic_vq.models.repository import TAGS

TEMPLATE = Path(__file__).with_name("card_template.md")
AUDIT_REPORT = "memorization.json"
COMPARISON = "comparison.md"
NOT_RECORDED = "not recorded"
DATASET_TITLES = {"ham10000": "HAM10000", "uda1": "UDA-1"}
# Name and labels of a metric, and its title on the Hub.
KNOWN: tuple[tuple[str, dict[str, str], str], ...] = (
    ("psnr", {}, "PSNR of reconstructions (dB)"),
    ("ssim", {}, "SSIM of reconstructions"),
    ("bits_per_code", {}, "Bits per code"),
    ("frechet_distance", {"images": "floor"}, "Frechet distance of other real images"),
    ("frechet_distance", {"images": "reconstructions"}, "Frechet distance of reconstructions"),
    ("frechet_distance", {"images": "samples"}, "Frechet distance of generated images"),
    ("recall", {"images": "samples"}, "Recall of generated images"),
    ("auc", {"real": "200", "arm": "flips"}, "AUROC for melanoma, trained on 200 real images"),
    ("auc", {"real": "200", "arm": "same mix 3:1"}, "AUROC for melanoma, 600 generated images added"),
)
STAGE_TITLES = {
    "vqvae": "tokenizer",
    "prior": "prior",
    "prior_start": "prior it started from",
    "decoder": "decoder, fine-tuned",
}


def as_text(text: str) -> str:
    """Escape foreign text, such as an attribution, as one line of Markdown that shows it literally."""
    line = re.sub(
        r"[<`|\\]|\](?=\()",
        lambda match: "&lt;" if match[0] == "<" else f"\\{match[0]}",
        " ".join(text.split()),
    )
    return re.sub(r"^(\d*)(?=[>#=~]|[-+*.)](\s|$)|--|\*\*|__)", r"\1\\", line)


def counts_text(counts: dict[str, int]) -> str:
    """Format the number of images of each diagnosis or licence."""
    return ", ".join(f"{as_text(name.replace('_', ' '))} {count:,}" for name, count in counts.items())


def dataset_title(uri: str) -> str:
    """Return a data set's name for readers: HAM10000 for "parquet:${DATA}/ham10000/test-*.parquet", else its folder's."""
    scheme, _, path = uri.partition(":")
    folders = [
        name for name in re.split(r"[/\\]", path) if name and not re.search(r"[*?${}]|\.parquet$", name)
    ]
    for name in folders:
        if name.lower() in DATASET_TITLES:
            return DATASET_TITLES[name.lower()]
    return "synthetic images" if scheme == "synthetic" else as_text((folders or [path or uri])[-1])


def write_card(folder: Path) -> None:
    """Write README.md of a repository folder; ValueError as `render_card`."""
    write_atomically(folder / "README.md", render_card(folder, folder.resolve().name).encode())


def render_card(folder: Path, name: str) -> str:
    """Render the card of a repository folder under a model's name; ValueError without report or provenance."""
    reports = read_reports(folder)
    origin = read_provenance(folder)
    config = IsicVQConfig.from_pretrained(folder)
    data = origin["training_data"]
    metrics = known_metrics(reports.values())
    main = Counter((metric.dataset, metric.split) for metric in metrics).most_common(1)
    indexed = [metric for metric in metrics if (metric.dataset, metric.split) == main[0][0]]
    metadata = ModelCardData(
        license=weights_license(licenses_of(origin.get(BY_STAGE, {"prior": data, "vqvae": None}))),
        library_name="transformers",
        pipeline_tag=TASK,
        tags=card_tags(folder, config),
        metrics=list(dict.fromkeys(eval_result(metric).metric_type for metric in indexed)),
        model_name=name,
        eval_results=[eval_result(metric) for metric in indexed],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=name,
        vqvae=config.vqvae_config,
        prior=config.prior_config,
        diagnoses=list(config.class_names.values()),
        previewed=[(as_text(n), preview_name(n)) for n in config.class_names.values()][:MAX_PREVIEWS],
        task=TASK,
        data=data,
        data_title=dataset_title(data["name"]),
        data_diagnoses=counts_text(data["diagnoses"]),
        topics={topic_of(metric) for report in reports.values() for metric in report.metrics},
        table=known_table(metrics),
        seeds=seeds_of(metrics),
        environments=measured_on(reports.values()),
        training=training_table(origin),
        stages=training_data_table(origin),
        attributions=attributions_of(origin),
        pictures={part: captions(folder / part) for part in ("previews", "figures")},
        audit=audit_verdict(reports),
        comparison=COMPARISON if (folder / COMPARISON).is_file() else None,
    )
    return card.content


def read_reports(folder: Path) -> dict[str, Report]:
    """Read a repository folder's reports, by file name; ValueError if there is none."""
    reports = {path.name: Report.load(path) for path in sorted((folder / "reports").glob("*.json"))}
    if not any(report.metrics for report in reports.values()):
        raise ValueError(f"{folder.name}/reports is empty: run isic-vq evaluate with --output there first")
    return reports


def known_metrics(reports: Iterable[Report]) -> list[Metric]:
    """The metrics of `KNOWN` that reports have, in its order; of several feature models those by the last."""
    metrics = [metric for report in reports for metric in report.metrics]
    yardstick = next((m.labels["yardstick"] for m in reversed(metrics) if m.name == "frechet_distance"), "")
    return [
        metric
        for name, labels, _ in KNOWN
        for metric in metrics
        if metric.name == name and metric.labels in (labels, {**labels, "yardstick": yardstick})
    ]


def read_provenance(folder: Path) -> dict[str, Any]:
    """Read a repository folder's `provenance.json`; ValueError if it is missing."""
    path = folder / "provenance.json"
    if not path.is_file():
        raise ValueError(f"{folder.name} has no provenance.json: write the folder with isic-vq export")
    return read_object(path)


def captions(folder: Path) -> dict[str, str]:
    """Read the captions of a folder's PNGs (field Comment), by name without suffix; ValueError for a file that is none."""
    comments = {}
    for path in sorted(folder.glob("*.png")):
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                comments[path.stem] = as_text(str(picture.info.get("Comment", "")))
        except (UnidentifiedImageError, SyntaxError) as error:
            raise ValueError(f"{folder.name}/{path.name} is not a readable PNG: remove it") from error
    return comments


def card_tags(folder: Path, config: IsicVQConfig) -> list[str]:
    """The Hub's tags: those of every model of ours, its kind of prior, and onnx where there are such files."""
    kind = config.prior_config.model_type.removeprefix("isic_")
    return [*TAGS, kind, *(["onnx"] if any((folder / "onnx").glob("*.onnx")) else [])]


def known_title(metric: Metric) -> str:
    """The title of a metric of `KNOWN`, and the feature model that it was measured with."""
    labels = {key: text for key, text in metric.labels.items() if key != "yardstick"}
    title = next(title for name, known, title in KNOWN if (name, known) == (metric.name, labels))
    return ", ".join([title, *(text for key, text in metric.labels.items() if key == "yardstick")])


def eval_result(metric: Metric) -> EvalResult:
    """A metric of `KNOWN` as the Hub's model-index has it."""
    title = dataset_title(metric.dataset)
    return EvalResult(
        task_type=TASK,
        task_name="Unconditional image generation",
        dataset_type=slug(title),
        dataset_name=title,
        dataset_split=metric.split,
        metric_type="roc_auc" if metric.name == "auc" else metric.name,
        metric_name=known_title(metric),
        metric_value=metric.value,
    )


def slug(title: str) -> str:
    """Reduce a name to lower-case letters and digits: "uda1" for "UDA-1"."""
    return re.sub(r"[^a-z0-9]", "", title.lower())


def column_title(metric: Metric) -> str:
    """Name what a metric was measured on: data set, split where its name adds something, and the number of items."""
    title = dataset_title(metric.dataset)
    split = "" if slug(metric.split) == slug(title) else f", {as_text(metric.split)}"
    return f"{title}{split} (n = {metric.n:,})"


def known_table(metrics: Iterable[Metric]) -> str:
    """Metrics of `KNOWN` as a Markdown table with a column for each data set; ValueError for one that was measured twice."""
    rows: dict[str, dict[str, str]] = {}
    for metric in metrics:
        row, column = rows.setdefault(known_title(metric), {}), column_title(metric)
        if column in row:
            raise ValueError(f"two values of {metric.text} of {column}: keep one of the two reports")
        row[column] = metric_cell(metric)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [[as_text(title), *(row.get(column, "") for column in columns)] for title, row in rows.items()]
    return markdown_table(["metric", *columns], cells)


def metric_cell(metric: Metric) -> str:
    """Format a value with its interval, rounded for reading."""
    value, interval = rounded(metric)
    return value if interval is None else f"{value} ({interval})"


def seeds_of(metrics: Iterable[Metric]) -> str:
    """The seeds of what metrics were drawn with, such as "0, 1"; nothing without any."""
    return ", ".join(map(str, sorted({metric.seed for metric in metrics if metric.seed is not None})))


def measured_on(reports: Iterable[Report]) -> str:
    """Name the machines and versions that reports were measured with."""
    described = [
        ", ".join(
            f"{name} {report.environment[key]}".strip()
            for key, name in (("device", ""), ("torch", "torch"), ("transformers", "transformers"))
            if key in report.environment
        )
        for report in reports
    ]
    return "; ".join(dict.fromkeys(filter(None, described))) or f"environment {NOT_RECORDED}"


def audit_verdict(reports: dict[str, Report]) -> str | None:
    """The verdict of the audit for memorised training images, which must have one; None without an audit."""
    if AUDIT_REPORT not in reports:
        return None
    verdict = reports[AUDIT_REPORT].tables.get("verdict")
    if not isinstance(verdict, str) or not verdict:
        raise ValueError(f"reports/{AUDIT_REPORT} has no table 'verdict': expected a sentence for the card")
    return verdict


def training_table(origin: dict[str, Any]) -> str:
    """Format how each part was trained, from the provenance, as a Markdown table; missing entries are "not recorded"."""
    training = origin.get("training", {})
    stages = ["vqvae", "prior", *(["decoder"] if "decoder" in training else [])]
    columns = {}
    for stage in stages:
        size = origin.get("num_parameters", {}).get(stage)
        parameters = {"parameters": f"{size:,}" if size else NOT_RECORDED}
        columns[stage] = parameters | training_column(training.get(stage, {}))
    return stages_table("", columns)


def stages_table(corner: str, columns: dict[str, dict[str, str]]) -> str:
    """Columns of cells by label, a stage each; rows that no stage says anything in are left out."""
    head = [corner, *(STAGE_TITLES[stage] for stage in columns)]
    labels = next(iter(columns.values()))
    rows = [[label, *(column[label] for column in columns.values())] for label in labels]
    return markdown_table(head, [row for row in rows if any(row[1:])], texts=len(head))


def attributions_of(origin: dict[str, Any]) -> list[str]:
    """Whom to name for the images of all parts, sorted."""
    stages = [info for info in origin.get(BY_STAGE, {}).values() if info] or [origin["training_data"]]
    return sorted({as_text(line) for info in stages for line in info["attributions"]})


def training_data_table(origin: dict[str, Any]) -> str:
    """Format what each part was trained on, from the provenance, as a Markdown table; missing entries are "not recorded"."""
    stages: dict[str, Any] = {"vqvae": None, **origin.get(BY_STAGE, {"prior": origin["training_data"]})}
    columns = {}
    for stage, info in stages.items():
        known = info or {}
        counts = known.get("licenses", {}).items()
        columns[stage] = {
            "images": say("{num_images:,}", known),
            "by licence": "; ".join(f"{as_text(name)}: {n:,}" for name, n in counts) or NOT_RECORDED,
            "sha256 of the manifest": say("`{manifest_sha256:.16}`", known, missing=""),  # of prepared data
        }
    return stages_table("trained on", columns)


def history(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A stage's training record, and those of the runs that its weights come from, the latest first."""
    return [record, *(history(record["started_from"]) if "started_from" in record else [])]


def training_column(record: dict[str, Any]) -> dict[str, str]:
    """Format one part's cells of the training table, by row."""
    recipe, machine = record.get("recipe", {}), record.get("environment", {})
    loop = recipe.get("loop", {})
    return {
        "optimizer steps": " after ".join(say("{steps:,}", stage) for stage in history(record)),
        "batch size": say("{batch_size} images", loop),
        "optimizer": say("AdamW, weight decay {weight_decay:g}", loop),
        "learning rate": say("{learning_rate:g}, {warmup_steps} steps of warm-up, then cosine to zero", loop),
        "device": say("{device}, {cores} cores", machine),
        "time in steps": " after ".join(say("{hours:.2g} h", stage) for stage in history(record)),
        "commit": say("`{git_commit:.12}`" + (", with changes" if machine.get("git_dirty") else ""), machine),
    }


def say(text: str, source: dict[str, Any], missing: str = NOT_RECORDED) -> str:
    """Fill a format string from a record; `missing` if the record lacks one of its fields."""
    fields = re.findall(r"{(\w+)", text)
    return text.format(**source) if all(source.get(name) is not None for name in fields) else missing
