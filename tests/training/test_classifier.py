"""The classifier stage: its loss, its augmentation, what is left out, and what a run leaves behind."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from run_folder import records, untimed
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score
from transformers import AutoImageProcessor, AutoModelForImageClassification

from isic_vq.data.schema import DataError
from isic_vq.evaluation.features import FeatureModel
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measures import classifier_measures
from isic_vq.evaluation.report import Report
from isic_vq.figures import write_figures
from isic_vq.models.diagnosis import DIAGNOSES
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.training.classifier import (
    balanced_cross_entropy,
    build_classifier,
    class_log_shares,
    classifier_metrics,
    normalised,
    random_colours,
    recoloured,
    train_classifier,
)
from isic_vq.training.load import load_recipe
from isic_vq.training.loop import InterruptedTraining
from isic_vq.training.recipe import ClassifierRecipe, RecipeError

TINY = "{embedding_size: 4, hidden_sizes: [4, 6], depths: [1, 1], layer_type: basic}"


@pytest.fixture
def make_recipe(tiny_run, tmp_path):
    def make(*overrides):
        settings = [
            f"output_dir={tmp_path / 'run'}",
            f"data.train=folder:{tiny_run.images['train']}",
            f"data.validation=folder:{tiny_run.images['validation']}",
            f"model={TINY}",
            "image_size=32",
            "loop.max_steps=6",
            "loop.batch_size=4",
            "loop.learning_rate=2e-3",
            "loop.warmup_steps=2",
            "loop.average_decay=0.5",
            "loop.precision=fp32",
            "loop.save_every=2",
        ]
        return load_recipe(ClassifierRecipe, None, [*settings, *overrides])

    return make


# Loss and augmentation


def test_loss_is_the_cross_entropy_of_adjusted_logits():
    logits = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.5, 2.0]])
    shares = [0.7, 0.2, 0.1]
    expected = 0.0
    for row, label in zip(logits.tolist(), (0, 1), strict=True):
        weights = [share * math.exp(logit) for share, logit in zip(shares, row, strict=True)]
        expected -= math.log(weights[label] / sum(weights)) / 2
    found = balanced_cross_entropy(logits, torch.tensor([0, 1]), torch.tensor(shares).log())
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_log_shares_are_those_of_the_labels():
    found = class_log_shares(torch.tensor([0, 1, 1, 1, 2, 2, 1, 1]), 3)
    np.testing.assert_allclose(found.exp(), [1 / 8, 5 / 8, 2 / 8], rtol=1e-6)


def test_the_adjustment_takes_class_frequency_out_of_the_logits():
    """Constant images: the best logits of a plain loss would be the log shares; those of ours are all alike."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    logits = torch.tensor([2.0, -1.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = balanced_cross_entropy(logits.expand(100, 2), labels, class_log_shares(labels, 2))
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (logits[0] - logits[1]).item() == pytest.approx(0, abs=1e-3)


def test_colours_depend_on_seed_epoch_and_image_alone_and_stay_in_range():
    first = random_colours(500, 0.2, seed=3, epoch=1)
    torch.manual_seed(9)
    assert torch.equal(random_colours(500, 0.2, seed=3, epoch=1), first)
    for seed, epoch in ((4, 1), (3, 2)):
        assert not torch.equal(random_colours(500, 0.2, seed, epoch), first)
    factors, offsets = first.unbind(1)
    assert 0.8 <= factors.min() < 0.81
    assert 1.19 < factors.max() <= 1.2
    assert -0.1 <= offsets.min() < -0.095
    assert 0.095 < offsets.max() <= 0.1


def test_each_channel_is_multiplied_shifted_and_cut_off():
    images = torch.full((2, 3, 2, 2), 0.5)
    colours = torch.tensor([[[1.0, 1.1, 0.9], [0.0, 0.1, -0.1]], [[1.2, 1.0, 1.0], [0.5, -0.6, 0.0]]])
    found = recoloured(images, colours)
    expected = [[0.5, 0.65, 0.35], [1.0, 0.0, 0.5]]
    np.testing.assert_allclose(found.amin((2, 3)), expected, atol=1e-6)
    np.testing.assert_allclose(found.amax((2, 3)), expected, atol=1e-6)


# Measures


def test_measures_are_those_of_scikit_learn():
    labels = torch.randint(0, 4, (60,))
    logits = torch.randn(60, 4) + 1.5 * torch.nn.functional.one_hot(labels, 4)
    classes = list(DIAGNOSES[:4])
    found = {name: measure(logits, labels) for name, measure in classifier_measures(classes, labels).items()}
    predicted = logits.argmax(1)
    assert found["accuracy", None] == pytest.approx((predicted == labels).double().mean().item())
    assert found["balanced_accuracy", None] == pytest.approx(balanced_accuracy_score(labels, predicted))
    for index, name in enumerate(classes):
        expected = roc_auc_score(labels == index, logits.softmax(1)[:, index])
        assert found["auc", name] == pytest.approx(expected, rel=1e-5)


def test_a_class_without_images_or_without_others_has_no_area_under_the_curve():
    of_all = {("accuracy", None), ("balanced_accuracy", None)}
    assert set(classifier_measures(["a", "b"], torch.tensor([0, 0]))) == of_all
    found = set(classifier_measures(["a", "b", "c"], torch.tensor([0, 1])))
    assert found == of_all | {("auc", "a"), ("auc", "b")}


def test_rare_classes_are_measured_together_but_not_reported_singly():
    labels = torch.tensor([0] * 12 + [1] * 9)
    logits = torch.nn.functional.one_hot(labels, 2).float()
    lines = classifier_metrics(logits, labels, ["melanoma", "nevus"], torch.zeros(2), MeasuredOn("test", "x"))
    found = {line.text: line for line in lines}
    assert found["recall[diagnosis=melanoma]"].n == 12
    assert "recall[diagnosis=nevus]" not in found
    assert found["balanced_accuracy"].n == 21
    assert found["balanced_accuracy"].value == 1
    for line in lines:
        assert line.interval[0] <= line.value <= line.interval[1], line.text


def test_one_image_of_each_class_gives_numbers_without_an_interval():
    lines = classifier_metrics(
        torch.eye(3), torch.arange(3), list(DIAGNOSES[:3]), torch.zeros(3), MeasuredOn("test", "x")
    )
    found = {line.text: line for line in lines}
    assert found["balanced_accuracy"].value == 1
    assert found["balanced_accuracy"].interval is None


# Runs


def test_a_run_leaves_a_classifier_that_transformers_opens(make_recipe, tmp_path):
    report = train_classifier(make_recipe())
    folder = tmp_path / "run" / "model"
    assert Report.load(tmp_path / "run" / "report.json") == report
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training_data.json",
    }
    classifier = AutoModelForImageClassification.from_pretrained(folder)
    assert list(classifier.config.id2label.values()) == list(DIAGNOSES[:8])
    assert json.loads((folder / "training_data.json").read_text())["classifier"]["num_images"] == 16
    features = FeatureModel.from_pretrained(str(folder))
    assert features.num_features == 6
    assert features.size == 32


def test_the_saved_processor_prepares_images_as_training_did(make_recipe, tmp_path):
    train_classifier(make_recipe())
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / "model")
    found = processor(Image.fromarray(pixels), return_tensors="pt").pixel_values
    ours = IsicVQImageProcessor(size=32)(Image.fromarray(pixels), return_tensors="pt").pixel_values
    torch.testing.assert_close(found, normalised(ours), atol=1e-5, rtol=0)


def test_the_report_is_what_the_saved_model_does(make_recipe, tiny_run, tmp_path):
    report = train_classifier(make_recipe())
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "model").eval()
    processor, predicted = IsicVQImageProcessor(size=32), []
    for index in range(16):
        image = processor(tiny_run.images["validation"] / f"{index:03d}.png", return_tensors="pt")
        with torch.no_grad():
            predicted.append(classifier(2 * image.pixel_values - 1).logits.argmax().item())
    classes = report.tables["classes"]
    names = (tiny_run.images["validation"] / "metadata.csv").read_text().splitlines()
    column = names[0].split(",").index("diagnosis")
    labels = [classes.index(line.split(",")[column]) for line in names[1:]]
    assert report.value("accuracy") == pytest.approx(np.mean(np.equal(labels, predicted)))
    assert report.tables["confusion"] == confusion_matrix(labels, predicted, labels=range(8)).tolist()


def relabelled(folder, target, names):
    """A copy of an image folder whose diagnoses are replaced, {new: old}."""
    shutil.copytree(folder, target)
    text = (target / "metadata.csv").read_text()
    for new, old in names.items():
        text = text.replace(f",{old},", f",{new},")
    (target / "metadata.csv").write_text(text)
    return target


def test_images_without_a_known_diagnosis_are_left_out_and_counted(make_recipe, tiny_run, tmp_path):
    train = relabelled(
        tiny_run.images["train"], tmp_path / "t", {"unknown": "melanoma", "nevus": "dermatofibroma"}
    )
    report = train_classifier(make_recipe(f"data.train=folder:{train}"))
    assert report.tables["left_out"] == {"train": 2, "validation": 4}, "no melanoma, no dermatofibroma"
    assert not {"melanoma", "dermatofibroma", "unknown"} & set(report.tables["classes"])
    assert report.metrics[0].n == 12


def test_a_classifier_learns_what_can_be_seen(make_recipe, tmp_path):
    train_classifier(make_recipe("loop.max_steps=60", "loop.learning_rate=1e-2", "augment=false"))
    losses = [record["loss"] for record in records(tmp_path / "run", "batch")]
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4])
def test_stop_and_resume_is_the_uninterrupted_run(make_recipe, tmp_path, monkeypatch, step):
    import isic_vq.training.classifier as stage

    train_classifier(make_recipe())
    reference = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    logged = untimed(records(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patch:
        from line_task import interrupt_at

        stop = interrupt_at(step)
        patch.setattr(stage.ClassifierTask, "before_step", lambda self, now: stop(now))
        with pytest.raises(InterruptedTraining):
            train_classifier(make_recipe())
    train_classifier(make_recipe(), resume=True)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == reference
    assert untimed(records(tmp_path / "run")) == logged


def test_a_run_has_its_figures(make_recipe, tmp_path):
    train_classifier(make_recipe())
    names = {path.name for path in write_figures(tmp_path / "run") if path.suffix == ".png"}
    assert names == {"classifier_batch_loss.png", "classifier_epoch_loss.png"}


def test_the_command_trains(run, tiny_run, tmp_path):
    code, out, err = run(
        *("train", "stage=classifier", f"output_dir={tmp_path / 'cli'}", f"model={TINY}", "image_size=32"),
        *(f"data.{part}=folder:{images}" for part, images in tiny_run.images.items()),
        *("loop.max_steps=4", "loop.batch_size=4", "loop.warmup_steps=1", "loop.precision=fp32"),
    )
    assert code == 0, err
    assert "balanced accuracy" in out
    assert (tmp_path / "cli" / "model" / "config.json").is_file()


# Bad input


def test_a_field_that_the_network_lacks_is_refused():
    with pytest.raises(RecipeError, match=r"model\.dephts: did you mean model\.depths\?"):
        build_classifier({"dephts": [1]}, ["melanoma", "nevus"])


@pytest.mark.parametrize(
    ("setting", "message"), [("image_size=8", "at least 16"), ("colour_strength=1", r"in \[0, 1\)")]
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(ClassifierRecipe, None, [setting])


def test_images_of_one_diagnosis_are_refused(make_recipe, tiny_run, tmp_path):
    target = shutil.copytree(tiny_run.images["train"], tmp_path / "one")
    text = (target / "metadata.csv").read_text()
    for name in DIAGNOSES[1:8]:
        text = text.replace(f",{name},", ",melanoma,")
    (target / "metadata.csv").write_text(text)
    with pytest.raises(DataError, match="expected at least two classes"):
        train_classifier(make_recipe(f"data.train=folder:{target}"))


def test_a_streamed_source_is_refused(make_recipe):
    with pytest.raises(DataError, match="is streamed: write it to files"):
        train_classifier(make_recipe("data.stream=true"))
