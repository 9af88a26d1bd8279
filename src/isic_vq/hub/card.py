"""Render the model card of a repository folder, and nothing that its files do not say.

Numbers come from `reports/*.json`, `provenance.json` and the configs: what none of them holds cannot reach the card.
The text is `card_template.md`, the metadata that of the Hub (its model-index has every metric of every report).

A report named `memorization.json` is the audit for memorised training images: its table `verdict` is the sentence
that the card shows, and its metrics stand among the others. A file `comparison.md` becomes a section of the card.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image, UnidentifiedImageError

from isic_vq.data.licenses import weights_license
from isic_vq.data.provenance import BY_STAGE, licenses_of
from isic_vq.evaluation.report import Metric, Report
from isic_vq.evaluation.report_tables import markdown_table, number_text, report_tables, topic_of
from isic_vq.files import MAX_PREVIEWS, preview_name, write_atomically
from isic_vq.models.configuration_isic_vq import TASK, IsicVQConfig
from isic_vq.models.repository import TAGS

TEMPLATE = Path(__file__).with_name("card_template.md")
AUDIT_REPORT = "memorization.json"
COMPARISON = "comparison.md"
NOT_RECORDED = "not recorded"
DATASET_TITLES = {"ham10000": "HAM10000", "uda1": "UDA-1"}
STAGE_TITLES = {"vqvae": "tokenizer", "prior": "prior", "decoder": "decoder, fine-tuned"}


def as_text(text: str) -> str:
    """Text of others, such as an attribution, as Markdown that shows it and nothing else, on one line."""
    line = re.sub(
        r"[<`|\\]|\](?=\()",
        lambda match: "&lt;" if match[0] == "<" else f"\\{match[0]}",
        " ".join(text.split()),
    )
    return re.sub(r"^(\d*)(?=[>#=~]|[-+*.)](\s|$)|--|\*\*|__)", r"\1\\", line)


def counts_text(counts: dict[str, int]) -> str:
    """How many images there are of each diagnosis or licence."""
    return ", ".join(f"{as_text(name.replace('_', ' '))} {count:,}" for name, count in counts.items())


def dataset_title(uri: str) -> str:
    """A data set's name for readers: HAM10000 for "parquet:${DATA}/ham10000/test-*.parquet", else its folder's."""
    scheme, _, path = uri.partition(":")
    folders = [
        name for name in re.split(r"[/\\]", path) if name and not re.search(r"[*?${}]|\.parquet$", name)
    ]
    for name in folders:
        if name.lower() in DATASET_TITLES:
            return DATASET_TITLES[name.lower()]
    return "synthetic images" if scheme == "synthetic" else as_text((folders or [path or uri])[-1])


def write_card(folder: Path) -> None:
    """Write README.md of a repository folder.

    Raises:
        ValueError: as `render_card`.
    """
    write_atomically(folder / "README.md", render_card(folder, folder.resolve().name).encode())


def render_card(folder: Path, name: str) -> str:
    """The card of a repository folder, metadata and text.

    Args:
        folder: the folder.
        name: what the card calls the model.

    Raises:
        ValueError: the folder has no report or provenance, or its reports contradict each other.
    """
    reports = read_reports(folder)
    origin = read_provenance(folder)
    config = IsicVQConfig.from_pretrained(folder)
    data = origin["training_data"]
    # Of parts of the images the reports tell; the Hub's index is for what is compared between models.
    metrics = [metric for report in reports.values() for metric in report.metrics if metric.group is None]
    metadata = ModelCardData(
        license=weights_license(licenses_of(origin.get(BY_STAGE, {"prior": data, "vqvae": None}))),
        library_name="transformers",
        pipeline_tag=TASK,
        tags=card_tags(folder, config),
        metrics=list(dict.fromkeys(metric.text for metric in metrics)),
        model_name=name,
        eval_results=[eval_result(metric) for metric in metrics],
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
        topics={topic_of(metric) for metric in metrics},
        has_batch_norm_gap=any(metric.name == "psnr_batch_statistics" for metric in metrics),
        table=metric_table(reports.values()),
        environments=measured_on(reports.values()),
        training=training_table(origin),
        stages=training_data_table(origin),
        attributions=attributions_of(origin),
        pictures={part: captions(folder / part) for part in ("previews", "figures")},
        audit=audit_verdict(reports),
        comparison=comparison_of(folder),
    )
    return card.content


def read_reports(folder: Path) -> dict[str, Report]:
    """A repository folder's reports, by file name.

    Raises:
        ValueError: there is none.
    """
    reports = {path.name: Report.load(path) for path in sorted((folder / "reports").glob("*.json"))}
    if not any(report.metrics for report in reports.values()):
        raise ValueError(f"{folder.name}/reports is empty: run isic-vq evaluate with --output there first")
    return reports


def comparison_of(folder: Path) -> str | None:
    """What `comparison.md` of a repository folder says of the model beside others; None where there is none."""
    path = folder / COMPARISON
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def read_provenance(folder: Path) -> dict[str, Any]:
    """A repository folder's `provenance.json`.

    Raises:
        ValueError: it is missing.
    """
    path = folder / "provenance.json"
    if not path.is_file():
        raise ValueError(f"{folder.name} has no provenance.json: write the folder with isic-vq export")
    return json.loads(path.read_text(encoding="utf-8"))


def captions(folder: Path) -> dict[str, str]:
    """What the pictures of a folder say of themselves (PNG field Comment), by name without suffix.

    Raises:
        ValueError: one of them is no PNG.
    """
    found = {}
    for path in sorted(folder.glob("*.png")):
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                found[path.stem] = as_text(str(picture.info.get("Comment", "")))
        except (UnidentifiedImageError, SyntaxError) as error:
            raise ValueError(f"{folder.name}/{path.name} is not a readable PNG: remove it") from error
    return found


def card_tags(folder: Path, config: IsicVQConfig) -> list[str]:
    """The Hub's tags: those of every model of ours, its kind of prior, and onnx where there are such files."""
    kind = config.prior_config.model_type.removeprefix("isic_")
    return [*TAGS, kind, *(["onnx"] if any((folder / "onnx").glob("*.onnx")) else [])]


def eval_result(metric: Metric) -> EvalResult:
    """A report's line as the Hub's model-index has it."""
    title = dataset_title(metric.dataset)
    known = {"seed": metric.seed, "interval_95": metric.interval}
    return EvalResult(
        task_type=TASK,
        task_name="Unconditional image generation",
        dataset_type=slug(title),
        dataset_name=title,
        dataset_split=metric.split,
        metric_type=metric.text,
        metric_name=f"{metric.text} ({metric.unit})",
        metric_value=metric.value,
        metric_args={"n": metric.n, **{key: value for key, value in known.items() if value is not None}},
    )


def slug(title: str) -> str:
    """A name in small letters and digits: "uda1" for "UDA-1"."""
    return re.sub(r"[^a-z0-9]", "", title.lower())


def column_title(metric: Metric) -> str:
    """What a metric was measured on: data set, split where its name adds something, and how many items."""
    title = dataset_title(metric.dataset)
    split = "" if slug(metric.split) == slug(title) else f", {as_text(metric.split)}"
    return f"{title}{split} (n = {metric.n:,})"


def metric_table(reports: Iterable[Report]) -> str:
    """The metrics of the reports as Markdown, a headed table per topic; see `topic_tables`."""
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in topic_tables(reports).items())


def topic_tables(reports: Iterable[Report]) -> dict[str, str]:
    """The metrics of the reports as Markdown tables by topic; see `report_tables`.

    Raises:
        ValueError: one thing was measured twice.
    """
    tables = {}
    for table in report_tables((metric for report in reports for metric in report.metrics), column_title):
        rows = [
            [
                as_text(name),
                unit,
                *(metric_cell(row[column]) if column in row else "" for column in table.columns),
            ]
            for (name, unit), row in table.rows.items()
        ]
        tables[table.title] = markdown_table(["metric", "unit", *table.columns], rows, texts=2)
    return tables


def metric_cell(metric: Metric) -> str:
    """A value, its interval and seed, rounded for reading."""
    about = [] if metric.interval is None else ["{:.4g} to {:.4g}".format(*metric.interval)]
    about += [] if metric.seed is None else [f"seed {metric.seed}"]
    return number_text(metric.value) + (f" ({', '.join(about)})" if about else "")


def measured_on(reports: Iterable[Report]) -> str:
    """The machines and versions that the reports were measured with."""
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
    """What the audit for memorised training images found; None without one.

    Raises:
        ValueError: there is an audit without a verdict.
    """
    if AUDIT_REPORT not in reports:
        return None
    verdict = reports[AUDIT_REPORT].tables.get("verdict")
    if not isinstance(verdict, str) or not verdict:
        raise ValueError(f"reports/{AUDIT_REPORT} has no table 'verdict': expected a sentence for the card")
    return verdict


def training_table(origin: dict[str, Any]) -> str:
    """How each part was trained, from the provenance, as a Markdown table; what it lacks is "not recorded"."""
    training = origin.get("training", {})
    stages = ["vqvae", "prior", *(["decoder"] if "decoder" in training else [])]
    columns = [training_column(training.get(stage, {})) for stage in stages]
    sizes = [origin.get("num_parameters", {}).get(stage) for stage in stages]
    rows = {"parameters": [f"{size:,}" if size else NOT_RECORDED for size in sizes]}
    rows |= {label: [column[label] for column in columns] for label in columns[0]}
    return stages_table("", stages, rows)


def stages_table(corner: str, stages: Iterable[str], rows: dict[str, list[str]]) -> str:
    """A column per stage, rows by label; those that no stage says anything in are left out."""
    head = [corner, *(STAGE_TITLES[stage] for stage in stages)]
    shown = [[label, *cells] for label, cells in rows.items() if any(cells)]
    return markdown_table(head, shown, texts=len(head))


def attributions_of(origin: dict[str, Any]) -> list[str]:
    """Whom to name for the images of all parts, sorted."""
    stages = [info for info in origin.get(BY_STAGE, {}).values() if info] or [origin["training_data"]]
    return sorted({as_text(line) for info in stages for line in info["attributions"]})


def training_data_table(origin: dict[str, Any]) -> str:
    """What each part was trained on, from the provenance, as a Markdown table; what it lacks is "not recorded"."""
    stages: dict[str, Any] = {"vqvae": None, **origin.get(BY_STAGE, {"prior": origin["training_data"]})}
    columns = []
    for info in stages.values():
        about = info or {}
        licenses = "; ".join(
            f"{as_text(name)}: {count:,}" for name, count in about.get("licenses", {}).items()
        )
        columns.append(
            {
                "images": say("{num_images:,}", about),
                "by licence": licenses or NOT_RECORDED,
                "snapshot of the source": as_text(say("{snapshot}", about)),
                "sha256 of the ids": say("`{ids_sha256:.16}`", about),
                "sha256 of the content": say("`{fingerprint:.16}`", about),
                "sha256 of the manifest": say("`{manifest_sha256:.16}`", about, missing=""),
            }
        )
    # Data that were not prepared have no manifest.
    return stages_table(
        "trained on", stages, {label: [column[label] for column in columns] for label in columns[0]}
    )


def history(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A stage's training record, and those of the runs that its weights come from, the latest first."""
    return [record, *(history(record["started_from"]) if "started_from" in record else [])]


def training_column(record: dict[str, Any]) -> dict[str, str]:
    """One part's cells of the training table, by row."""
    recipe, machine = record.get("recipe", {}), record.get("environment", {})
    loop = recipe.get("loop", {})
    return {
        "optimizer steps": " after ".join(say("{steps:,}", stage) for stage in history(record)),
        "batch size": say("{batch_size} images", loop),
        "optimizer": say("AdamW, weight decay {weight_decay:g}", loop),
        "learning rate": say("{learning_rate:g}, {warmup_steps} steps of warm-up, then cosine to zero", loop),
        "gradient norm": say("at most {max_grad_norm:g}", loop),
        "weight average": say("decay {average_decay:g} per step", loop),
        "weights kept": say("{weights}", record),
        "precision": say("{precision}", loop),
        "seed": say("{seed}", loop),
        "device": say("{device}, {cores} cores", machine),
        "time in steps": " after ".join(say("{hours:.2g} h", stage) for stage in history(record)),
        "software": say("isic-vq {isic_vq}, torch {torch}, transformers {transformers}", machine),
        "commit": say("`{git_commit:.12}`" + (", with changes" if machine.get("git_dirty") else ""), machine),
    }


def say(text: str, source: dict[str, Any], missing: str = NOT_RECORDED) -> str:
    """A format string filled from a record, or `missing` if the record lacks one of its fields."""
    fields = re.findall(r"{(\w+)", text)
    return text.format(**source) if all(source.get(name) is not None for name in fields) else missing
