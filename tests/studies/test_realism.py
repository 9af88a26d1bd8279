"""The two-sample classifier: what its numbers are, that plain differences are seen and equal sets are not."""

import json
import shutil

import numpy as np
import pytest
import torch
from coloured_images import NET
from sklearn.metrics import roc_auc_score

from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.realism import (
    PAIRS,
    default_student,
    evaluate_realism,
    realism_metrics,
    reconstructed,
)
from isic_vq.evaluation.report import Report
from isic_vq.evaluation.student import ClassifierStudy, LabelledImages, Student, train_student
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor

STUDENT = Student(steps=60, batch_size=12, image_size=16, learning_rate=1e-2, colour_strength=0.0, model=NET)


@pytest.fixture(scope="module")
def study(coloured_sets, noise_generator, tmp_path_factory):
    """A finished study: its folder and its lines by name."""
    folder, (train, test) = tmp_path_factory.mktemp("realism"), coloured_sets
    lines = evaluate_realism(
        ClassifierStudy(noise_generator, train, {"validation": test}, folder, seeds=2, student=STUDENT),
        resamples=100,
    )
    return folder, {line.text: line for line in lines}


def test_an_untrained_tokenizer_is_found_out_and_its_prior_is_not_to_blame_for_it(study):
    _, found = study
    assert found["two_sample_accuracy[real, reconstructions]"].value > 0.9
    assert found["two_sample_accuracy[real, samples]"].value > 0.9
    assert found["two_sample_auc[real, samples]"].value > 0.95
    assert found["two_sample_accuracy[real, samples]"].n == 70, "35 real images and as many samples"
    assert set(found) == {
        f"two_sample_{measure}[{one}, {other}]" for measure in ("accuracy", "auc") for one, other in PAIRS
    }


def test_two_sets_of_one_kind_cannot_be_told_apart():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (80, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.arange(80) % 2
    train, test = LabelledImages(pixels[:40], labels[:40]), LabelledImages(pixels[40:], labels[40:])
    logits = []
    for seed in (0, 1):
        classifier = train_student(train, ("one", "other"), STUDENT, seed).eval()
        with torch.inference_mode():
            logits.append(classifier((test.pixels.float() / 255 - 0.5) / 0.5).logits)
    accuracy, auc = realism_metrics(("one", "other"), logits, test.labels, MeasuredOn("test", "noise"))
    for line in (accuracy, auc):
        assert line.interval[0] < 0.5 < line.interval[1]


def test_numbers_are_the_means_over_seeds_of_accuracy_and_area(study):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) // 30
    logits = [
        torch.randn(60, 2, generator=generator) + labels[:, None] * torch.tensor([0.0, 1.0]) for _ in range(3)
    ]
    accuracy, auc = realism_metrics(
        ("real", "samples"), logits, labels, MeasuredOn("test", "x"), resamples=200
    )
    right = [(each.numpy().argmax(1) == labels.numpy()).mean() for each in logits]
    areas = [roc_auc_score(labels.numpy(), (each[:, 1] - each[:, 0]).numpy()) for each in logits]
    assert accuracy.value == pytest.approx(np.mean(right))
    assert auc.value == pytest.approx(np.mean(areas))
    for line in (accuracy, auc):
        assert line.interval[0] < line.value < line.interval[1]


def test_reconstructions_are_those_of_the_model_in_eight_bits(noise_generator):
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    decoded = noise_generator.decode(noise_generator.encode(pixels.float() / 255))
    expected = IsicVQImageProcessor().postprocess(decoded, output_type="np")
    assert np.array_equal(reconstructed(noise_generator, pixels, 16).permute(0, 2, 3, 1).numpy(), expected)
    assert reconstructed(noise_generator, pixels, 8).shape == (5, 3, 8, 8)


def test_by_default_the_classifier_sees_every_pixel_in_its_colour(noise_generator):
    student = default_student(noise_generator)
    assert (student.image_size, student.colour_strength) == (16, 0.0)


def test_samples_are_for_the_diagnoses_of_the_real_images(study):
    folder, _ = study
    for part, number in (("train", 36), ("test", 35)):
        settings = json.loads((folder / f"samples-{part}" / "generation.json").read_text())
        assert settings["num_images"] == number
    train, test = (
        json.loads((folder / f"samples-{part}" / "generation.json").read_text())["seed"]
        for part in ("train", "test")
    )
    assert train != test, "the classifier is tested on samples it has not seen"


def test_a_killed_study_goes_on_and_ends_as_the_uninterrupted_one(
    study, coloured_sets, noise_generator, tmp_path
):
    (finished, found), (train, test) = study, coloured_sets
    folder = tmp_path / "killed"
    shutil.copytree(finished, folder)
    (folder / "real-samples-seed1.json").unlink()
    shutil.rmtree(folder / "samples-test")
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("*-seed*.json")}
    lines = evaluate_realism(
        ClassifierStudy(noise_generator, train, {"validation": test}, folder, seeds=2, student=STUDENT),
        resamples=100,
    )
    assert {line.text: line for line in lines} == found
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept


def test_other_settings_and_a_single_seed_are_refused(study, coloured_sets, noise_generator, tmp_path):
    (folder, _), (train, test) = study, coloured_sets
    sets = train, {"validation": test}
    with pytest.raises(ValueError, match="begun with student.* and this is"):
        ClassifierStudy(noise_generator, *sets, folder, seeds=2, student=Student(steps=3, image_size=16))
    with pytest.raises(ValueError, match="expected at least 2"):
        ClassifierStudy(noise_generator, *sets, tmp_path, seeds=1, student=STUDENT)
    with pytest.raises(ValueError, match="steps is 0: expected at least 1"):
        ClassifierStudy(noise_generator, *sets, tmp_path, seeds=2, student=Student(steps=0))


@pytest.mark.slow
def test_the_command_writes_a_report(run, coloured_sets, noise_generator, tmp_path):
    noise_generator.save_pretrained(tmp_path / "model")
    code, out, err = run(
        *("evaluate", tmp_path / "model", "--only", "realism"),
        *("--train-data", coloured_sets[0], "--data", f"test={coloured_sets[1]}"),
        *("-o", tmp_path / "realism.json", "--work-dir", tmp_path / "work", "--seeds", 2, "--steps", 2),
        *("--limit", 20),
    )
    assert code == 0, err
    report = Report.load(tmp_path / "realism.json")
    assert report.model["classifier"]["image_size"] == 16
    assert {metric.n for metric in report.metrics} == {40}
    assert "two_sample_accuracy[real, samples]" in out
