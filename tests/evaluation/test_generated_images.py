"""Generated images between floor and ceiling: a tiny model end to end, each number computed a second way."""

import csv
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification, ResNetModel

from isic_vq.data.sources import find_source
from isic_vq.evaluation.appearance import grid_power, texture
from isic_vq.evaluation.code_noise import disturb_codes
from isic_vq.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
)
from isic_vq.evaluation.features import DiagnosisClassifier, FeatureModel, names_diagnoses
from isic_vq.evaluation.generation import (
    EmbeddedImages,
    Yardstick,
    agreement_metrics,
    evaluate_generation,
    generated_images,
    matched_rows,
)
from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.report import Report
from isic_vq.hub.pretrained import load_model
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.sampling import Sampling

DISTANCES = ["frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage"]
KINDS = ["floor", "reconstructions", "disturbed", "samples"]
HAM10000 = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]


def save_resnet(folder, labels, kind=ResNetForImageClassification):
    """A tiny ResNet as a user would have saved it."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 6],
        depths=[1, 1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
    )
    kind(config).save_pretrained(folder)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A classifier of diagnoses, one of other things, and a model without a head."""
    root = tmp_path_factory.mktemp("yardsticks")
    return {
        "skin": save_resnet(root / "skin", HAM10000),
        "things": save_resnet(root / "things", ["tench", "goldfish"]),
        "headless": save_resnet(root / "headless", ["tench", "goldfish"], ResNetModel),
    }


@pytest.fixture(scope="module")
def yardsticks(folders):
    return [Yardstick.from_pretrained(str(folders[name])) for name in ("skin", "headless")]


@pytest.fixture(scope="module")
def model(tiny_run):
    """Its prior is stirred: after six steps of training it would not look at labels."""
    model = load_model(IsicVQModel, str(tiny_run.prior / "model"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.prior.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def sources(tiny_run):
    return find_source(f"folder:{tiny_run.images['validation']}"), find_source(
        f"folder:{tiny_run.images['train']}"
    )


@pytest.fixture(scope="module")
def evaluated(model, yardsticks, sources):
    return evaluate_generation(model, yardsticks, *sources, "validation", seed=3)


def read(folder):
    """Pixels of a folder's images and their diagnoses, in the order of their names."""
    images = [Image.open(path) for path in sorted(folder.glob("*.png"))]
    with (folder / "metadata.csv").open() as file:
        diagnoses = {row["file_name"]: row["diagnosis"] for row in csv.DictReader(file)}
    pixels = IsicVQImageProcessor(size=16)(images, return_tensors="pt")["pixel_values"]
    return pixels, [diagnoses[name] for name in sorted(diagnoses)]


def eight_bits(pixels):
    return torch.from_numpy(np.rint(pixels.numpy() * 255).clip(0, 255).astype(np.uint8) / np.float32(255))


@pytest.fixture(scope="module")
def by_hand(model, tiny_run):
    """The sets of images, made without `evaluate_generation`."""
    real, diagnoses = read(tiny_run.images["validation"])
    others, _ = read(tiny_run.images["train"])
    ids = {name: index for index, name in model.config.class_names.items()}
    generator = torch.Generator().manual_seed(3)
    codebook = model.vqvae.quantizer.codebook  # of eight codes: all others are near
    noisy = disturb_codes(model.encode(others), codebook, 1.0, 1.0, 7, generator)
    with torch.no_grad():
        return {
            "reference": real,
            "floor": others,
            "reconstructions": eight_bits(model.decode(model.encode(others))),
            "disturbed": eight_bits(model.decode(noisy)),
            "reference reconstructions": eight_bits(model.decode(model.encode(real))),
            "samples": eight_bits(model.generate(16, [ids[name] for name in diagnoses], seed=3).pixel_values),
        }, diagnoses


def test_every_distance_has_its_lines_side_by_side(evaluated):
    metrics, _ = evaluated
    for name in ("skin", "headless"):
        expected = [f"{distance}[{kind}, {name}]" for distance in DISTANCES for kind in KINDS]
        assert [m.text for m in metrics if m.text.split("[")[0] in DISTANCES and name in m.text] == expected


def test_every_line_says_how_many_images_which_seed_and_how_sure(evaluated, sources):
    metrics, _ = evaluated
    for metric in metrics:
        num_images = 14 if "agreement" in metric.text else 16  # the classifier knows seven of eight diagnoses
        assert (metric.n, metric.seed) == (num_images, 3), metric.text
        assert (metric.split, metric.dataset) == ("validation", sources[0].name)
        assert metric.interval[0] <= metric.value <= metric.interval[1], metric.text


def test_no_interval_leaves_what_its_number_can_be(evaluated):
    for metric in evaluated[0]:
        name = metric.text.split("[")[0]
        if name in ("precision", "recall", "coverage", "agreement"):
            assert metric.interval[1] <= 1, metric.text
        if name not in ("kernel_distance", "coherence"):
            assert metric.interval[0] >= 0, metric.text


def test_distances_are_those_of_images_made_by_hand(evaluated, by_hand, yardsticks):
    report = Report({}, evaluated[0])
    images, _ = by_hand
    for yardstick in yardsticks:
        with torch.no_grad():
            features = {kind: yardstick.features(pixels).numpy() for kind, pixels in images.items()}
        for kind in KINDS:
            pair = features["reference"], features[kind]
            expected = {
                "frechet_distance": frechet_distance(*pair),
                "kernel_distance": kernel_distance(*pair),
                **precision_recall_density_coverage(*pair),
            }
            got = {name: report.value(name, images=kind, yardstick=yardstick.name) for name in expected}
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-9), (kind, yardstick.name)


def test_floor_reconstructions_and_samples_are_told_apart(evaluated):
    report = Report({}, evaluated[0])
    values = {report.value("frechet_distance", images=kind, yardstick="headless") for kind in KINDS}
    assert len(values) == len(KINDS)


def test_the_look_of_samples_is_measured(evaluated, by_hand):
    report, samples = Report({}, evaluated[0]), by_hand[0]["samples"]
    assert report.value("texture", images="samples") == pytest.approx(
        texture(samples).mean().item(), rel=1e-4
    )
    grids = grid_power(samples, (4, 2))
    assert report.value("grid_power_median", images="samples", period="2 px") == pytest.approx(
        np.median(grids[:, 1]), rel=1e-3
    )
    assert report.value("grid_power_worst_tenth", images="samples", period="4 px") == pytest.approx(
        grids[:, 0].sort().values[-2:].mean().item(), rel=1e-3
    )


def test_agreement_is_counted_by_hand(evaluated, by_hand, folders):
    images, diagnoses = by_hand
    classifier = ResNetForImageClassification.from_pretrained(folders["skin"]).eval()
    names = ["actinic_keratosis", "basal_cell_carcinoma", "benign_keratosis", "dermatofibroma"]
    names += ["melanoma", "nevus", "vascular_lesion"]
    known = [row for row, name in enumerate(diagnoses) if name in names]
    for kind, made in {
        "reference": "reference",
        "reconstructions": "reference reconstructions",
        "samples": "samples",
    }.items():
        with torch.no_grad():
            predicted = classifier((images[made] - 0.5) / 0.5).logits.argmax(1).tolist()
        expected = np.mean([names[predicted[row]] == diagnoses[row] for row in known])
        line = next(m for m in evaluated[0] if m.text == f"agreement[{kind}, skin]")
        assert line.value == pytest.approx(expected)
        assert line.n == len(known)


def test_a_model_without_diagnoses_has_no_agreement(evaluated):
    assert not [m.text for m in evaluated[0] if "agreement" in m.text and "headless" in m.text]


def test_lines_and_table_fit_a_report(evaluated, tmp_path):
    metrics, table = evaluated
    report = Report({"name": "tiny"}, metrics, {"generation": table})
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report
    assert sum(table["diagnoses"].values()) == 16
    assert table["sampling"]["temperature"] == 1


def test_another_seed_makes_other_samples_of_the_same_real_images(evaluated, model, yardsticks, sources):
    """All others are needed, so that the seed has none to draw."""
    first, (second, _) = evaluated[0], evaluate_generation(model, yardsticks, *sources, "validation", seed=4)
    values = [{m.text: m.value for m in metrics} for metrics in (first, second)]
    changed = {re.split(r"[\[,\]]", name)[1] for name in values[0] if values[0][name] != values[1][name]}
    assert changed == {"disturbed", "samples"}


def test_labels_decide_images(model):
    """Else no test here would see a wrong label."""
    images = torch.cat([model.generate(1, label, seed=0).pixel_values for label in range(8)])
    assert len(torch.unique(images.flatten(1), dim=0)) > 4


def test_an_image_of_no_class_is_matched_by_an_unlabelled_sample(model, yardsticks, tiny_run, tmp_path):
    """All melanomas are of unknown diagnosis here."""
    folders = {}
    for part in ("validation", "train"):
        folders[part] = tmp_path / part
        shutil.copytree(tiny_run.images[part], folders[part])
        table = folders[part] / "metadata.csv"
        table.write_text(table.read_text().replace("melanoma", "unknown"))
    sources = [find_source(f"folder:{folder}") for folder in folders.values()]
    metrics, table = evaluate_generation(model, yardsticks[1:], *sources, "validation", seed=3)
    assert table["diagnoses"]["unknown"] == 2
    real, diagnoses = read(folders["validation"])
    ids = {name: index for index, name in model.config.class_names.items()}
    labels = torch.tensor(
        [model.prior.config.unconditional_id if d == "unknown" else ids[d] for d in diagnoses]
    )
    samples = eight_bits(model.generate(16, labels, seed=3).pixel_values)
    with torch.no_grad():
        expected = frechet_distance(*(yardsticks[1].features(images).numpy() for images in (real, samples)))
    got = Report({}, metrics).value("frechet_distance", images="samples", yardstick="headless")
    assert got == pytest.approx(expected, rel=1e-4)


def test_sampling_settings_reach_the_samples(model):
    labels = torch.zeros(3, dtype=torch.long)
    likeliest = torch.cat(list(generated_images(model, labels, 0, Sampling(top_k=1))))
    assert torch.equal(likeliest[0], likeliest[1]), "the most likely codes are no matter of chance"
    drawn = torch.cat(list(generated_images(model, labels, 0)))
    assert not torch.equal(drawn[0], drawn[1])


def test_images_over_several_blocks_are_those_of_one_seeded_set(model):
    labels = torch.arange(20) % 8
    blocks = list(generated_images(model, labels, seed=5))
    assert [len(block) for block in blocks] == [16, 4]
    expected = model.generate(20, labels, seed=5, backend="eager").pixel_values
    torch.testing.assert_close(torch.cat(blocks), expected)


def test_images_are_rounded_to_eight_bits_before_they_are_compared(yardsticks):
    levels = torch.randint(0, 256, (2, 3, 16, 16)) / 255
    seen = []
    for images in (levels, levels + 0.3 / 255):
        embedded = EmbeddedImages(yardsticks)
        embedded.add(images, ["nevus", "nevus"])
        seen.append(embedded.joined("headless"))
    np.testing.assert_array_equal(*seen)


def test_matched_rows_have_the_diagnoses_that_are_wanted():
    pool = ["nevus"] * 50 + ["melanoma"] * 9 + ["unknown"] * 5
    wanted = ["melanoma"] * 4 + ["nevus"] * 7
    rows = matched_rows(pool, wanted, seed=0)
    assert Counter(pool[row] for row in rows) == Counter(wanted)
    assert rows == sorted(set(rows)), "in order, none twice"
    assert rows == matched_rows(pool, wanted[::-1], seed=0) != matched_rows(pool, wanted, seed=1)


def test_a_pool_with_too_few_of_a_diagnosis_is_refused():
    with pytest.raises(ValueError, match="have 1 of melanoma and the reference has 2"):
        matched_rows(["melanoma", "nevus"], ["melanoma", "melanoma"], seed=0)


def test_a_reference_is_not_its_own_floor(model, yardsticks, sources):
    with pytest.raises(ValueError, match="16 of the other real images are in the reference"):
        evaluate_generation(model, yardsticks, sources[0], sources[0], "validation")


def test_a_reference_of_few_images_is_refused(model, yardsticks, sources, tiny_run, tmp_path):
    shutil.copytree(tiny_run.images["validation"], tmp_path / "few")
    rows = (tmp_path / "few" / "metadata.csv").read_text().splitlines()[:9]
    (tmp_path / "few" / "metadata.csv").write_text("\n".join(rows) + "\n")
    for path in sorted((tmp_path / "few").glob("*.png"))[8:]:
        path.unlink()
    with pytest.raises(ValueError, match="the reference has 8 images: expected at least 12"):
        evaluate_generation(model, yardsticks, find_source(f"folder:{tmp_path / 'few'}"), sources[1], "few")


@pytest.mark.parametrize("number", [0, 2])
def test_yardsticks_have_names_of_their_own(number, model, yardsticks, sources):
    with pytest.raises(ValueError, match="expected at least one, and each name once"):
        evaluate_generation(model, yardsticks[:1] * number, *sources, "validation")


def test_a_yardstick_is_called_like_its_folder_and_reads_diagnoses_if_it_can(folders):
    opened = {name: Yardstick.from_pretrained(str(folder)) for name, folder in folders.items()}
    assert {name: yardstick.name for name, yardstick in opened.items()} == {name: name for name in folders}
    assert {name for name, yardstick in opened.items() if yardstick.classifier} == {"skin"}
    assert isinstance(opened["things"].features, FeatureModel)


def test_classifier_names_canonical_diagnoses(folders):
    classifier = DiagnosisClassifier.from_pretrained(str(folders["skin"]))
    assert classifier.diagnoses[:2] == ["actinic_keratosis", "basal_cell_carcinoma"]
    images = torch.rand(4, 3, 16, 16)
    direct = ResNetForImageClassification.from_pretrained(folders["skin"]).eval()((images - 0.5) / 0.5)
    torch.testing.assert_close(classifier(images), direct.logits)
    assert classifier.name(images) == [classifier.diagnoses[i] for i in direct.logits.argmax(1)]


@pytest.mark.parametrize("name", ["things", "headless"])
def test_what_names_no_diagnoses_is_no_classifier_of_them(name, folders):
    assert not names_diagnoses(str(folders[name]))
    with pytest.raises(ValueError, match="is no image classifier whose labels name diagnoses"):
        DiagnosisClassifier.from_pretrained(str(folders[name]))


def test_agreement_counts_known_diagnoses_over_all_and_in_parts_of_ten():
    asked = ["melanoma"] * 10 + ["nevus"] * 9 + ["unknown"] * 3
    named = {"samples": ["melanoma"] * 7 + ["nevus"] * 12 + ["melanoma"] * 3}
    lines = agreement_metrics(
        named, asked, {"melanoma", "nevus"}, "skin", MeasuredOn("validation", "data"), 5
    )
    got = {line.text: (line.value, line.n, line.seed) for line in lines}
    assert got == {
        "agreement[samples, skin]": (16 / 19, 19, 5),
        "agreement[samples, skin, diagnosis=melanoma]": (0.7, 10, 5),
    }
    assert all(0 <= line.interval[0] < line.value < line.interval[1] <= 1 for line in lines)


def test_agreement_of_unknown_diagnoses_is_left_out():
    assert (
        agreement_metrics({"samples": ["nevus"]}, ["unknown"], {"nevus"}, "skin", MeasuredOn("s", "d"), 0)
        == []
    )
