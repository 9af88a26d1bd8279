"""The utility study: that it finds a planted worth and no other, what its arms are, and that a killed study goes on."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from coloured_images import NET, STUDENT
from PIL import Image
from sklearn.metrics import roc_auc_score

from isic_vq.evaluation import utility
from isic_vq.evaluation.report import Report
from isic_vq.evaluation.student import (
    ClassifierStudy,
    LabelledImages,
    Student,
    train_student,
    two_level_interval,
)
from isic_vq.evaluation.utility import UtilityStudy, correct, drawn_from_pools

REST = {"nevus": 26, "vascular_lesion": 6}  # of 40 images


def write_site(folder, number, seed):
    """Images of which the mean of blue tells melanoma, and red and green, which vary more, tell nothing."""
    generator = np.random.default_rng(seed)
    folder.mkdir()
    names = [name for name, share in {"melanoma": 8, **REST}.items() for _ in range(share * number // 40)]
    lines = ["file_name,isic_id,diagnosis"]
    for index, name in enumerate(names):
        colour = np.array([120, 120, 140 - 45 * (name == "melanoma")]) + generator.normal(0, (40, 40, 22))
        pixels = np.clip(colour + generator.integers(-20, 21, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(f"{index}.png,ISIC_{seed}_{index},{name}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return f"folder:{folder}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    return write_site(folder / "train", 160, 0), {
        "own": write_site(folder / "own", 80, 1),
        "far": write_site(folder / "far", 80, 2),
    }


def measured(site, model, folder, seeds, **design):
    study = ClassifierStudy(model, *site, folder, seeds=seeds, student=STUDENT)
    return UtilityStudy(study, "melanoma", seeds=seeds, **design)


@pytest.fixture(scope="module")
def study(site, noise_generator, tmp_path_factory):
    """A finished study of few passes: it, its folder and its report."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utility, "PASSES", 2)
        made = measured(site, noise_generator, folder, 2, sizes=["20", "40"], ratios=[1], planted=True)
        yield made, folder, made.report()


# What it finds


@pytest.mark.slow
def test_held_out_real_images_have_a_worth_and_noise_has_none(site, noise_generator, tmp_path, monkeypatch):
    monkeypatch.setattr(utility, "PASSES", 10)
    monkeypatch.setattr(utility, "BASELINES", utility.BASELINES[:1])
    design = {"sizes": ["10"], "ratios": [5], "planted": True}
    report = measured(site, noise_generator, tmp_path, 8, **design).report()
    for split in ("own", "far"):
        gains = {row["name"]: row for row in report.tables["comparisons"] if row["test"] == split}
        assert gains["held-out real images 5:1"]["interval"][0] > 0
        assert gains["noise 3:1"]["interval"][0] <= 0
        assert gains["noise 3:1"]["verdict"] != "gain"


def test_gains_are_differences_from_the_reference_paired_by_seed(study):
    made, folder, report = study
    rows = made.study.records["own"]
    positive = np.array(rows["diagnosis"]) == "melanoma"

    def areas(arm):
        files = [json.loads((folder / f"n40-{arm}-seed{seed}.json").read_text()) for seed in (0, 1)]
        logits = [np.array(file["logits"])[: len(positive)] for file in files]
        return [roc_auc_score(positive, each[:, 1] - each[:, 0]) for each in logits]

    for arm, slug in (("oversampling", "oversampling"), ("same mix 1:1", "same-mix-1to1")):
        assert report.value("auc", "own", real="40", arm=arm) == pytest.approx(np.mean(areas(slug)))
        (row,) = [
            row
            for row in report.tables["comparisons"]
            if (row["test"], row["real"], row["name"]) == ("own", 40, arm)
        ]
        assert row["seeds"] == pytest.approx(np.subtract(areas(slug), areas("flips")))
        assert report.value("auc_gain", "own", real="40", arm=arm) == pytest.approx(np.mean(row["seeds"]))


def test_every_arm_and_test_is_in_the_report(study):
    _, _, report = study
    arms = ["flips", "no augmentation", "oversampling", "class weights", "longer"]
    arms += ["same mix 1:1", "rare alone 1:1", "held-out real images 1:1", "noise 1:1"]
    assert [m.labels["arm"] for m in report.metrics if m.name == "auc"] == arms * 4
    assert {(m.split, m.labels["real"]) for m in report.metrics} == set(
        itertools.product(("own", "far"), ("20", "40"))
    )
    assert report.tables["half_widths"]["own"]["positive"] == 16
    assert 0 < report.tables["half_widths"]["own"]["median_of_gains"] < 0.5
    assert report.model["seeds"] == {"20": 2, "40": 2}
    for angles in report.tables["ita"].values():
        assert angles["n"] + angles["without_skin"] == 160
        assert -180 <= angles["5%"] <= angles["50%"] <= angles["95%"] <= 180


def test_cost_counts_every_image_shown(study):
    _, _, report = study
    rare, real = {20: 4, 40: 8}, (20, 40)
    shown = 0.0
    for number in real:
        oversampled = number + rare[number] * (round((number - rare[number]) / rare[number]) - 1)
        images = 3 * number + oversampled + utility.LONGER * number
        images += 2 * number + (number + rare[number]) + 2 * number + 2 * number
        shown += 2 * images * utility.passes(number)
    assert report.tables["cost"]["images_shown"] == pytest.approx(shown, abs=1)
    assert report.tables["cost"]["classifiers"] == 36
    assert report.tables["cost"]["images_generated"] == 160, "one pool has enough for every cell"
    assert report.tables["cost"]["seconds"] > 0
    counted = report.tables["cost"]["operations"] / shown
    # Of 16 x 16 pixels: a first layer of 7 x 7 x 3 x 4 at 8 x 8 positions, forward and to its weights, is the least.
    assert counted > 4 * 7 * 7 * 3 * 4 * 64


# Arms


def test_arms_have_the_images_that_they_say(study):
    made, _, _ = study
    arms = {arm.name: arm for arm in made.cells[20]}
    counts = {name: torch.bincount(made.images(20, arm, 0).labels).tolist() for name, arm in arms.items()}
    assert counts["flips"] == counts["no augmentation"] == counts["longer"] == [16, 4]
    assert counts["oversampling"] == [16, 16]
    assert counts["same mix 1:1"] == counts["held-out real images 1:1"] == counts["noise 1:1"] == [32, 8]
    assert counts["rare alone 1:1"] == [16, 8]
    real = made.images(20, arms["flips"], 0).pixels
    for name in arms:
        assert torch.equal(made.images(20, arms[name], 0).pixels[:20], real), (
            "arms of a seed share their images"
        )
    assert not torch.equal(made.images(20, arms["flips"], 1).pixels, real)
    held_out = made.images(20, arms["held-out real images 1:1"], 0).pixels[20:]
    assert not {each.numpy().tobytes() for each in held_out} & {each.numpy().tobytes() for each in real}


def test_large_sites_have_fewer_seeds_and_no_ratio_above_three(study):
    made, _, _ = study
    names = {
        number: [arm.name for arm in utility.arms(number, 5387, (1, 3, 10), True)]
        for number in (200, 1000, 5387)
    }
    planted = {
        number: [name for name in found if name.startswith(("held-out", "noise"))]
        for number, found in names.items()
    }
    assert planted == {
        200: ["held-out real images 10:1", "noise 3:1"],
        1000: ["held-out real images 3:1", "noise 3:1"],
        5387: ["noise 3:1"],  # no real image is left over
    }
    assert "same mix 10:1" in names[1000]
    assert "same mix 3:1" in names[5387]
    assert "same mix 10:1" not in names[5387]
    made = UtilityStudy(made.study, "melanoma", sizes=["20"])
    assert [len(made.seeds_of(number)) for number in (100, 101, 1000, 1001)] == [10, 5, 5, 3]


def test_pools_give_each_image_once_and_of_its_diagnosis():
    diagnoses = np.array(["a"] * 6 + ["b"] * 3)
    drawn = drawn_from_pools(diagnoses, np.array([0, 1, 6]), 7, seed=0)
    assert sorted(drawn) == [0, 1, 2], "14 of a need three pools of 6"
    pairs = [(k, row) for k, rows in drawn.items() for row in rows.tolist()]
    assert len(set(pairs)) == len(pairs) == 21
    assert sum(diagnoses[row] == "b" for _, row in pairs) == 7
    again = drawn_from_pools(diagnoses, np.array([0, 1, 6]), 7, seed=0)
    assert all(np.array_equal(again[k], rows) for k, rows in drawn.items())


def test_a_verdict_needs_the_correction_and_every_seed():
    def row(p_value, seeds, added="same mix"):
        return {"p_value": p_value, "seeds": seeds, "added": added}

    rows = [
        row(0.001, [0.1, 0.2]),
        row(0.001, [0.1, -0.01]),
        row(0.02, [-0.1, -0.2]),
        row(0.0001, [-0.1, -0.2]),
        row(0.04, [0.1, 0.1], "noise"),
    ]
    correct(rows)
    assert [each["verdict"] for each in rows] == ["gain", "not significant", "loss", "loss", "gain"]
    assert [each["corrected"] for each in rows] == pytest.approx([0.003, 0.003, 0.02, 0.0004, 0.04])


@pytest.mark.parametrize(
    ("design", "message"),
    [
        ({"sizes": ["many"]}, "expected numbers or 'all'"),
        ({"sizes": ["1000"]}, "size 1000: expected 2 to 160"),
        ({"sizes": ["2"]}, "2 training images, drawn by diagnosis"),
    ],
)
def test_bad_designs_are_refused(study, design, message):
    made, _, _ = study
    with pytest.raises(ValueError, match=message):
        UtilityStudy(made.study, "melanoma", **design)
    with pytest.raises(ValueError, match="positive is 'x': expected one of"):
        UtilityStudy(made.study, "x")


@pytest.mark.parametrize(("melanomas", "others"), [(1, 9), (9, 1), (0, 9)])
def test_a_test_of_too_few_images_is_refused_before_anything_is_trained(
    site, noise_generator, tmp_path, melanomas, others
):
    (tmp_path / "few").mkdir()
    names = ["melanoma"] * melanomas + ["nevus"] * others
    lines = [f"{index}.png,ISIC_{index},{name}" for index, name in enumerate(names)]
    for index in range(len(names)):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(tmp_path / "few" / f"{index}.png")
    (tmp_path / "few" / "metadata.csv").write_text("\n".join(["file_name,isic_id,diagnosis", *lines]) + "\n")
    tests = {"own": site[1]["own"], "few": f"folder:{tmp_path / 'few'}"}
    message = f"few has {melanomas} images of melanoma and {others} others: expected at least two of each"
    with pytest.raises(ValueError, match=message):
        measured((site[0], tests), noise_generator, tmp_path / "work", 2, sizes=["20"])
    assert not list((tmp_path / "work").glob("n*.json"))


# Resuming


def test_a_killed_study_goes_on_and_ends_as_the_uninterrupted_one(study, site, noise_generator, tmp_path):
    _, finished, report = study
    folder = tmp_path / "killed"
    shutil.copytree(finished, folder)
    lost = ["n20-same-mix-1to1-seed0.json", "n40-noise-1to1-seed1.json"]
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("n*.json") if path.name not in lost}
    for name in lost:
        (folder / name).unlink()
    shutil.rmtree(folder / "synthetic-seed0")
    again = measured(site, noise_generator, folder, 2, sizes=["20", "40"], ratios=[1], planted=True).report()
    assert again.metrics == report.metrics
    assert again.tables["comparisons"] == report.tables["comparisons"]
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept, (
        "what is there is not done again"
    )


def test_a_folder_begun_with_other_settings_is_refused(study, site, noise_generator):
    _, folder, _ = study
    with pytest.raises(ValueError, match="begun with student.* and this is"):
        ClassifierStudy(noise_generator, *site, folder, seeds=2, student=Student(steps=3))
    with pytest.raises(ValueError, match="begun with own.* and this is"):
        ClassifierStudy(noise_generator, site[0], {"own": site[0]}, folder, seeds=2, student=STUDENT)


def test_one_seed_is_refused(site, noise_generator, tmp_path):
    with pytest.raises(ValueError, match="expected at least 2"):
        ClassifierStudy(noise_generator, *site, tmp_path, seeds=1, student=STUDENT)


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
def test_a_classifier_takes_its_steps_however_many_images_it_has(number):
    images = LabelledImages(
        torch.randint(0, 256, (number, 3, 16, 16), dtype=torch.uint8), torch.arange(number) % 2
    )
    student = Student(steps=7, batch_size=4, image_size=16, model=NET)
    trained = train_student(images, ["melanoma", "nevus"], student, 0)
    seen = [
        value.item() for name, value in trained.state_dict().items() if name.endswith("num_batches_tracked")
    ]
    assert set(seen) == {7}


def test_passes_decide_the_steps():
    images = LabelledImages(torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8), torch.arange(30) % 2)
    for passes, steps in ((2.0, 5), (0.1, 1)):
        student = Student(passes=passes, batch_size=12, image_size=16, model=NET)
        trained = train_student(images, ["melanoma", "nevus"], student, 0).state_dict()
        seen = [value.item() for name, value in trained.items() if name.endswith("num_batches_tracked")]
        assert set(seen) == {steps}


def test_augmentation_and_class_weights_are_options_of_a_training():
    images = LabelledImages(
        torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8), (torch.arange(12) < 3).long()
    )
    weights = []
    for changed in ({}, {"augment": False}, {"class_weights": True}):
        student = Student(steps=2, batch_size=12, image_size=16, model=NET, **changed)
        trained = train_student(images, ["other", "melanoma"], student, 0)
        weights.append(trained.classifier[1].weight.detach())
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))


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


# The command


@pytest.mark.slow
def test_the_command_writes_a_report_and_its_curves(run, site, noise_generator, tmp_path):
    noise_generator.save_pretrained(tmp_path / "model")
    train, tests = site
    code, out, err = run(
        *("evaluate", tmp_path / "model", "--only", "utility", "--smoke", "--train-data", train),
        *(word for name, uri in tests.items() for word in ("--data", f"{name}={uri}")),
        *("-o", tmp_path / "utility.json", "--work-dir", tmp_path / "work"),
    )
    assert code == 0, err
    report = Report.load(tmp_path / "utility.json")
    assert report.model["smoke"] is True
    assert {metric.n for metric in report.metrics} == {50}
    assert "auc_gain[50, same mix 1:1]" in out
    for name in ("generated", "real"):
        with Image.open(tmp_path / f"utility-{name}.png") as picture:
            assert picture.width > 600
