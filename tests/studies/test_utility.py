"""The utility study: what its numbers mean, that a useless generator is seen, and that a killed study goes on."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from coloured_images import COLOURS, NET, STUDENT

from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.report import Report
from isic_vq.evaluation.student import (
    ClassifierStudy,
    LabelledImages,
    Student,
    train_student,
    two_level_interval,
)
from isic_vq.evaluation.utility import ARMS, evaluate_utility, utility_metrics


@pytest.fixture(scope="module")
def study(coloured_sets, noise_generator, tmp_path_factory):
    """A finished study: its folder and its lines by name."""
    folder = tmp_path_factory.mktemp("study")
    lines = evaluate_utility(
        ClassifierStudy(
            noise_generator, *coloured_sets, folder, seeds=2, student=STUDENT, split="validation"
        ),
        resamples=100,
    )
    return folder, {line.text: line for line in lines}


# What it finds


def test_real_images_beat_chance_and_those_of_a_broken_generator_do_not(study):
    _, found = study
    assert found["balanced_accuracy[real]"].value > 0.9
    assert found["balanced_accuracy[synthetic]"].value < 0.67, "chance is a third"
    assert found["balanced_accuracy_gain[synthetic]"].interval[1] < 0
    assert found["auc[real, melanoma]"].value > 0.9


def test_gains_are_differences_from_real(study):
    _, found = study
    for measure, more in (("balanced_accuracy", ""), ("auc", ", melanoma"), ("auc", ", nevus")):
        for arm in ARMS[1:]:
            difference = found[f"{measure}[{arm}{more}]"].value - found[f"{measure}[real{more}]"].value
            assert found[f"{measure}_gain[{arm}{more}]"].value == pytest.approx(difference, abs=1e-9)
    assert not any("_gain[real]" in name or "_gain[real," in name for name in found)


def test_rare_classes_are_hidden_and_count_in_the_mean(study):
    _, found = study
    for arm in ARMS:
        assert found[f"sensitivity[{arm}, diagnosis=melanoma]"].n == 14
        assert found[f"sensitivity[{arm}, diagnosis=nevus]"].n == 16
        assert f"sensitivity[{arm}, diagnosis=vascular_lesion]" not in found
    assert found["balanced_accuracy[real]"].n == 35


def test_generated_images_have_the_class_counts_of_the_real_ones(study):
    folder, _ = study
    labels = json.loads((folder / "synthetic-seed0" / "generation.json").read_text())["labels"]
    assert {name: labels.count(name) for name in COLOURS} == dict.fromkeys(COLOURS, 12)
    seeds = [
        json.loads((folder / f"synthetic-seed{seed}" / "generation.json").read_text())["seed"]
        for seed in (0, 1)
    ]
    assert seeds == [0, 1], "each seed has images of its own"


# Resuming


def test_a_killed_study_goes_on_and_ends_as_the_uninterrupted_one(
    study, coloured_sets, noise_generator, tmp_path
):
    finished, found = study
    folder = tmp_path / "killed"
    shutil.copytree(finished, folder)
    lost = ["synthetic-seed0.json", "real+synthetic-seed1.json"]
    kept = {
        path.name: path.stat().st_mtime_ns for path in folder.glob("*-seed*.json") if path.name not in lost
    }
    for name in lost:
        (folder / name).unlink()
    shutil.rmtree(folder / "synthetic-seed1")
    lines = evaluate_utility(
        ClassifierStudy(
            noise_generator, *coloured_sets, folder, seeds=2, student=STUDENT, split="validation"
        ),
        resamples=100,
    )
    assert {line.text: line for line in lines} == found
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept, (
        "what is there is not done again"
    )
    for name in lost:
        assert (folder / name).read_bytes() == (finished / name).read_bytes()


def test_a_folder_begun_with_other_settings_is_refused(study, coloured_sets, noise_generator):
    folder, _ = study
    with pytest.raises(ValueError, match="begun with student.* and this is"):
        ClassifierStudy(noise_generator, *coloured_sets, folder, seeds=2, student=Student(steps=3))
    with pytest.raises(ValueError, match="begun with test.* and this is"):
        ClassifierStudy(noise_generator, coloured_sets[0], coloured_sets[0], folder, seeds=2, student=STUDENT)


def test_one_seed_is_refused(coloured_sets, noise_generator, tmp_path):
    with pytest.raises(ValueError, match="expected at least 2"):
        ClassifierStudy(noise_generator, *coloured_sets, tmp_path, seeds=1, student=STUDENT)


# Training


def test_a_classifier_is_a_function_of_its_seed():
    images = LabelledImages(
        torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.tensor([0, 1] * 4)
    )
    student = Student(steps=5, batch_size=4, image_size=16, model=NET)
    first, again, other = (
        train_student(images, ["melanoma", "nevus"], student, seed).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("number", [3, 8, 30])
def test_every_arm_takes_the_same_steps_however_many_images_it_has(number):
    images = LabelledImages(
        torch.randint(0, 256, (number, 3, 16, 16), dtype=torch.uint8), torch.arange(number) % 2
    )
    student = Student(steps=7, batch_size=4, image_size=16, model=NET)
    trained = train_student(images, ["melanoma", "nevus"], student, 0)
    seen = [
        value.item() for name, value in trained.state_dict().items() if name.endswith("num_batches_tracked")
    ]
    assert set(seen) == {7}


# Intervals


def test_interval_of_two_seeds_and_two_images_is_that_of_all_draws():
    """A bootknife draw of two rows is one of them twice: four equally likely draws, written out."""
    scores = torch.tensor([[0.1, 0.5], [0.3, 0.9]])  # of seeds (rows) and images
    draws = [scores[seed, image].item() for seed, image in itertools.product((0, 1), (0, 1))]
    low, high, mean = two_level_interval(
        lambda seed, rows: scores[seed][rows].mean().item(), 2, torch.tensor([0, 0]), torch.arange(2), 400
    )
    assert (low, high) == pytest.approx((min(draws), max(draws)))
    assert mean == pytest.approx(np.mean(draws))


def test_interval_has_the_variance_of_seeds_and_images_together():
    """Of an additive statistic, mean of seed effects plus mean of image effects, it is s2/S + t2/N."""
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randn(20, generator=generator, dtype=torch.float64)
    images = 3 * torch.randn(300, generator=generator, dtype=torch.float64)
    labels = torch.zeros(300, dtype=torch.int64)
    low, high, mean = two_level_interval(
        lambda seed, rows: (seeds[seed] + images[rows].mean()).item(), 20, labels, torch.arange(300), 4000
    )
    half = 1.96 * (seeds.var() / 20 + images.var() / 300).sqrt().item()
    assert mean == pytest.approx((seeds.mean() + images.mean()).item())
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)


def test_classes_keep_their_size_in_every_draw():
    labels = torch.tensor([0] * 5 + [1] * 20 + [2])
    drawn = []

    def count(seed, rows):
        drawn.append(torch.bincount(labels[rows], minlength=3).tolist())
        return 0.0

    two_level_interval(count, 2, labels, torch.arange(26), 50)
    assert drawn == [[5, 20, 1]] * len(drawn)


def test_images_that_every_seed_gets_right_leave_the_seeds_to_decide():
    labels = torch.arange(40) % 2
    right = 8.0 * torch.nn.functional.one_hot(labels, 2)
    logits = {arm: [right, right] for arm in ARMS}
    logits["synthetic"] = [right, -right]
    found = {
        line.text: line
        for line in utility_metrics(
            logits, labels, ["melanoma", "nevus"], MeasuredOn("test", "x"), resamples=200
        )
    }
    assert found["balanced_accuracy[real]"].interval == [1.0, 1.0]
    assert found["balanced_accuracy[synthetic]"].value == 0.5
    assert found["balanced_accuracy[synthetic]"].interval == [0.0, 1.0]
    assert found["balanced_accuracy_gain[synthetic]"].interval == [-1.0, 0.0]
    assert found["auc_gain[real+synthetic, melanoma]"].value == 0.0


# The command


def test_the_command_writes_a_report(run, coloured_sets, noise_generator, tmp_path):
    noise_generator.save_pretrained(tmp_path / "model")
    code, out, err = run(
        *("evaluate", tmp_path / "model", "--only", "utility"),
        *("--train-data", coloured_sets[0], "--data", f"test={coloured_sets[1]}"),
        *("-o", tmp_path / "utility.json", "--work-dir", tmp_path / "work", "--seeds", 2, "--steps", 2),
        *("--limit", 20),
    )
    assert code == 0, err
    report = Report.load(tmp_path / "utility.json")
    assert report.model["limit"] == 20
    assert report.model["classifier"]["steps"] == 2
    assert {metric.n for metric in report.metrics if "sensitivity" not in metric.text} == {20}
    assert "balanced_accuracy_gain[synthetic]" in out
