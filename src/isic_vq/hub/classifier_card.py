"""Write a trained classifier as a Hub repository's folder: weights, configs, report, recipe, and a card of their numbers.

The card's text is `classifier_card_template.md`; its numbers are those of `reports/validation.json`, `training_data.json`
and the weights. Any Hub tool opens the folder, without this package.
"""

import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from isic_vq.data.licenses import weights_license
from isic_vq.data.provenance import TRAINING_DATA, licenses_of, read_training_data
from isic_vq.evaluation.report import Metric, Report
from isic_vq.evaluation.report_tables import markdown_table
from isic_vq.files import replaced_directory, write_atomically
from isic_vq.hub.card import as_text, counts_text, dataset_title, measured_on
from isic_vq.hub.pretrained import read_object
from isic_vq.yaml_text import read_yaml

REPORT = "reports/validation.json"
TEMPLATE = Path(__file__).with_name("classifier_card_template.md")


def is_classifier_run(folder: Path) -> bool:
    """Whether a folder is that of a run that trains a classifier."""
    try:
        recipe = read_yaml((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(recipe, dict) and recipe.get("stage") == "classifier"


def export_classifier(run: Path, folder: Path) -> None:
    """Write a classifier's finished run as a Hub repository's folder, which is replaced; ValueError for any other run."""
    for name in ("report.json", "recipe.yaml", f"model/{TRAINING_DATA}"):
        if not (run / name).is_file():
            raise ValueError(f"{run.name} has no {name}: expected the finished run of a classifier")
    with replaced_directory(folder) as temporary:
        shutil.copytree(run / "model", temporary, dirs_exist_ok=True)
        shutil.copy(run / "recipe.yaml", temporary)
        (temporary / REPORT).parent.mkdir()
        shutil.copy(run / "report.json", temporary / REPORT)
        for path in temporary.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        write_atomically(temporary / "README.md", render_classifier_card(temporary, folder.name).encode())


def render_classifier_card(folder: Path, name: str) -> str:
    """Render the card of a classifier's repository folder; ValueError for another kind of model."""
    report, config = Report.load(folder / REPORT), read_object(folder / "config.json")
    info = read_training_data(folder).get("classifier")
    if info is None or config["model_type"] != "resnet":
        raise ValueError(f"{folder.name} is no classifier of isic-vq: export one with isic-vq export RUN DIR")
    weights = folder / "model.safetensors"
    prepared = read_object(folder / "preprocessor_config.json")
    license = weights_license(licenses_of({"classifier": vars(info)}))
    metadata = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=["dermoscopy", "isic", "resnet"],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=name,
        parameters=f"{report.model['num_parameters']:,}",
        megabytes=f"{weights.stat().st_size / 1e6:.1f}",
        size=prepared["size"]["shortest_edge"],
        table=_table(report.metrics),
        environment=measured_on([report]),
        report=REPORT,
        data_title=dataset_title(info.name),
        images=f"{info.num_images:,}",
        diagnoses=counts_text(info.diagnoses),
        licenses=counts_text(info.licenses),
        training_data=TRAINING_DATA,
        attributions="\n".join(f"- {as_text(line)}" for line in info.attributions),
        license=license,
    )
    return card.content


def _table(metrics: list[Metric]) -> str:
    head = ["measure", "value", "95 % interval", "unit", "images"]
    rows = [
        [
            metric.text,
            f"{metric.value:.3f}",
            " to ".join(f"{bound:.3f}" for bound in metric.interval or []),
            "" if metric.unit == "1" else metric.unit,
            f"{metric.n} of {dataset_title(metric.dataset)}, {metric.split}",
        ]
        for metric in metrics
    ]
    return markdown_table(head, rows, texts=len(head))
