"""The classifier's repository folder: whole, small, and a card that says what its files say."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from isic_vq.evaluation.features import FeatureModel
from isic_vq.evaluation.report import Metric, Report
from isic_vq.hub.classifier_card import REPORT, export_classifier, render_classifier_card
from isic_vq.training.classifier import train_classifier
from isic_vq.training.load import load_recipe
from isic_vq.training.recipe import ClassifierRecipe

SHIPPED = Path(__file__).resolve().parents[1] / "model_cards" / "isic-derm-features"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run on synthetic images and its repository folder."""
    folder = tmp_path_factory.mktemp("classifier")
    settings = [
        f"output_dir={folder / 'run'}",
        "data.train=synthetic:24:0",
        "data.validation=synthetic:16:1",
        "model={embedding_size: 4, hidden_sizes: [4], depths: [1], layer_type: basic}",
        "image_size=16",
        "loop.max_steps=2",
        "loop.batch_size=8",
        "loop.precision=fp32",
        "loop.warmup_steps=1",
    ]
    train_classifier(load_recipe(ClassifierRecipe, None, settings))
    export_classifier(folder / "run", folder / "tiny-features")
    return folder / "tiny-features"


def test_the_folder_is_whole(exported):
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert names == {
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "recipe.yaml",
        "training_data.json",
        REPORT,
    }


def test_the_card_has_every_number_of_the_report(exported):
    text = (exported / "README.md").read_text()
    for metric in Report.load(exported / REPORT).metrics:
        low, high = metric.interval
        assert f"| {metric.text} | {metric.value:.3f} | {low:.3f} to {high:.3f} |" in text
    assert "license: cc0-1.0" in text
    assert "24 images" in text


def test_another_report_makes_another_card(exported, tmp_path):
    report = Report.load(exported / REPORT)
    before = render_classifier_card(exported, "x")
    try:
        line = Metric("accuracy", 0.123, "1", 16, "validation", "synthetic:16:1", interval=[0.1, 0.2])
        Report(report.model, [line]).save(exported / REPORT)
        changed = render_classifier_card(exported, "x")
    finally:
        report.save(exported / REPORT)
    assert "| accuracy | 0.123 | 0.100 to 0.200 |" in changed
    assert "balanced_accuracy |" not in changed
    assert changed != before == render_classifier_card(exported, "x")


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="has no report.json: expected the finished run"):
        export_classifier(tmp_path / "run", tmp_path / "out")


def test_the_shipped_card_is_what_its_files_say():
    assert (SHIPPED / "README.md").read_text() == render_classifier_card(SHIPPED, SHIPPED.name)


def test_the_shipped_extractor_is_small_and_opens():
    assert (SHIPPED / "model.safetensors").stat().st_size <= 4_000_000
    features = FeatureModel.from_pretrained(str(SHIPPED))
    images = torch.rand(2, 3, 128, 128)
    with torch.no_grad():
        pooled = AutoModel.from_pretrained(SHIPPED)(2 * images - 1).pooler_output.flatten(1)
        torch.testing.assert_close(features(images), pooled)
    assert pooled.shape == (2, features.num_features)
    assert torch.isfinite(pooled).all()
    assert pooled.std(0).max() > 0
