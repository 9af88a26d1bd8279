"""The audit of a tiny model from end to end: its report, its pairs, its pictures, and its command."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score
from transformers import ResNetConfig, ResNetModel

from isic_vq.data.code_cache import read_code_cache, write_code_cache
from isic_vq.data.schema import DataError
from isic_vq.evaluation.audit import (
    audit_checkpoint,
    compare_codes,
    decoded_features,
    generate_samples,
    membership_metrics,
    sample_labels,
)
from isic_vq.evaluation.features import FeatureModel
from isic_vq.evaluation.measured_images import class_ids
from isic_vq.evaluation.report import Report
from isic_vq.figures.evaluation import named_images, pair_images
from isic_vq.hub.pretrained import load_model
from isic_vq.models.likelihood import score_codes
from isic_vq.models.modeling_isic_vq import IsicVQModel


@pytest.fixture(scope="module")
def model(tiny_run):
    return load_model(IsicVQModel, str(tiny_run.prior / "model"))


@pytest.fixture(scope="module")
def train(tiny_run):
    return read_code_cache(tiny_run.codes["train"])


@pytest.fixture(scope="module")
def held_out(tiny_run):
    return read_code_cache(tiny_run.codes["validation"])


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A tiny image model as a user would have saved it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-features"
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 16}))
    return folder


@pytest.fixture(scope="module")
def copied(tiny_run, features):
    """An audit whose samples are the training images themselves."""
    return audit_checkpoint(
        str(tiny_run.prior / "model"),
        tiny_run.codes["train"],
        tiny_run.codes["validation"],
        [str(features)],
        samples_from=f"folder:{tiny_run.images['train']}",
    )


def test_training_images_as_samples_are_their_own_neighbours(copied, train):
    assert copied.samples.names == train.isic_ids
    for channel in ("codes", "tiny-features"):
        assert [pair.distance for pair in copied.pairs[channel]] == pytest.approx([0] * 16, abs=1e-9)
    for pair in copied.pairs["codes"]:
        same = train.codes[pair.row, pair.view] == train.codes[pair.sample, 0]
        assert same.all(), "itself, or an image of the same codes"


def test_the_report_has_every_line_with_its_count_and_survives_a_round_trip(copied, tmp_path):
    report = copied.report
    for channel in ("codes", "tiny-features"):
        assert report.value("nearest_distance", "samples", channel=channel) == pytest.approx(0, abs=1e-9)
        near = next(metric for metric in report.metrics if metric.text == f"near_samples[{channel}]")
        assert (near.n, near.value) == (16, copied.excess[channel].count)
        assert near.interval[0] <= near.value <= near.interval[1]
        assert report.value("near_samples_by_chance", channel=channel) == pytest.approx(16 / 17)
        assert report.value("held_out_neighbours_by_chance", channel=channel) == 1 / 2
    assert len(report.tables["closest_pairs"]["codes"]) == 16
    assert any(of["verdict"] for of in report.tables["excess"].values()) == copied.verdict
    words = "Training images are repeated" if copied.verdict else "No repeated training images were detected"
    assert report.tables["verdict"].startswith(words)
    assert f"{copied.excess['codes'].count} by codes" in report.tables["verdict"]
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


def test_two_channels_share_the_level(copied):
    assert [excess.level for excess in copied.excess.values()] == [0.025, 0.025]


@pytest.mark.parametrize("num_samples", [1, 7, 100, 250])
def test_samples_have_the_classes_of_the_training_images_in_proportion(num_samples):
    counts = torch.tensor([60, 3, 12, 25])
    ids = torch.arange(4).repeat_interleave(counts)[torch.randperm(100)]
    found = torch.bincount(sample_labels(ids, num_samples), minlength=4)
    assert found.sum() == num_samples
    assert ((found - counts * num_samples / 100).cumsum(0).abs() <= 0.5).all(), "rounded, not cut off"


def test_a_diagnosis_that_the_model_does_not_have_is_unconditional(model, train):
    names = dataclasses.replace(train, diagnoses=["unknown", *train.diagnoses[1:]])
    ids = class_ids(model, names.diagnoses).tolist()
    assert ids[0] == model.prior.config.unconditional_id
    assert [model.config.class_names[index] for index in ids[1:]] == train.diagnoses[1:]


def test_the_samples_of_a_seed_are_the_models(model, train):
    samples = generate_samples(model, train, 5, seed=3)
    again, other = (generate_samples(model, train, 5, seed=seed) for seed in (3, 4))
    assert torch.equal(samples.codes, again.codes)
    assert not torch.equal(samples.codes, other.codes)


def test_features_are_those_of_decoded_codes_in_every_view(model, features, train):
    extractor = FeatureModel.from_pretrained(str(features))
    found = decoded_features(model, extractor, train.first_views()[:3], num_views=8)
    with torch.inference_mode():
        images = model.vqvae.decode(train.first_views()[:3], noise=False)
        turned = torch.rot90(images.flip(-1), 1, (-2, -1))
        torch.testing.assert_close(found[:, 5], extractor(turned))
        torch.testing.assert_close(found[:, 0], extractor(images))


def test_features_are_of_images_without_the_decoders_noise(model, features, train):
    """As of a decoder whose weights for the noise are zero."""
    codes = train.first_views()[:3]
    silent = copy.deepcopy(model)
    silent.vqvae.decoder.refinement.first.weight.data[:, -1] = 0
    extractor = FeatureModel.from_pretrained(str(features))
    features = decoded_features(model, extractor, codes, num_views=1)[:, 0]
    torch.testing.assert_close(features, extractor(silent.decode(codes)))
    assert (features - extractor(model.decode(codes))).abs().max() > 1e-4, "`decode` draws noise"


def test_membership_is_the_area_of_scikit_learn_and_the_gap_the_difference_of_means(model, train, held_out):
    metrics = {metric.text: metric for metric in membership_metrics(model, train, held_out, limit=16, seed=0)}
    ids = {name: index for index, name in model.config.class_names.items()}
    bits = [
        score_codes(model, cache.first_views(), torch.tensor([ids[name] for name in cache.diagnoses]))
        .flatten(1)
        .mean(1)
        .numpy()
        for cache in (train, held_out)
    ]
    area = roc_auc_score(np.repeat([0, 1], 16), np.concatenate(bits))
    assert metrics["membership_auc"].value == pytest.approx(area, abs=1e-6)
    assert metrics["likelihood_gap"].value == pytest.approx(bits[1].mean() - bits[0].mean(), abs=1e-6)
    for metric in metrics.values():
        assert metric.n == 32
        assert metric.interval[0] < metric.value < metric.interval[1]


def test_a_limit_takes_a_seeded_subset_of_both(model, train, held_out):
    first, again, other = (
        membership_metrics(model, train, held_out, limit=5, seed=seed)[1] for seed in (0, 0, 1)
    )
    assert first == again
    assert first.n == 10
    assert first.value != other.value


def test_pairs_are_shown_as_their_codes_decode_or_as_the_training_images(copied, model, tiny_run):
    samples, decoded = pair_images(copied, "codes")
    pairs = copied.shown_pairs("codes")
    with torch.inference_mode():
        expected = model.decode(copied.samples.codes[[pair.sample for pair in pairs]])
    torch.testing.assert_close(samples, expected)
    assert decoded.shape == samples.shape
    unturned = [index for index, pair in enumerate(pairs) if pair.view == 0 and pair.row == pair.sample]
    assert unturned
    torch.testing.assert_close(decoded[unturned], samples[unturned])
    uri = f"folder:{tiny_run.images['train']}"
    _, real = pair_images(copied, "codes", uri)
    names = [copied.train.isic_ids[pairs[index].row] for index in unturned]
    torch.testing.assert_close(real[unturned], named_images(uri, names, 16))
    assert not torch.allclose(real, decoded, atol=0.01), "pixels, not codes"


def test_a_training_image_is_shown_in_the_view_that_the_sample_is_near_to(copied, model, tiny_run):
    pair = dataclasses.replace(copied.pairs["codes"][0], row=3, view=5)
    turned = dataclasses.replace(copied, pairs={"codes": [pair]})
    image = named_images(f"folder:{tiny_run.images['train']}", [copied.train.isic_ids[3]], 16)
    _, shown = pair_images(turned, "codes", f"folder:{tiny_run.images['train']}")
    assert torch.equal(shown, torch.rot90(image.flip(-1), 1, (-2, -1)))
    assert not torch.equal(shown, image)


def test_images_that_a_source_lacks_are_named(tiny_run):
    with pytest.raises(DataError, match="lacks 1 of the images to show, such as ISIC_9"):
        named_images(f"folder:{tiny_run.images['train']}", ["ISIC_9"], 16)


def test_held_out_images_that_are_training_images_are_refused(tiny_run):
    with pytest.raises(DataError, match=r"16 images of train\.parquet are in train\.parquet"):
        audit_checkpoint(str(tiny_run.prior / "model"), tiny_run.codes["train"], tiny_run.codes["train"])


def test_codes_of_another_tokenizer_are_refused(tiny_run, held_out, tmp_path):
    write_code_cache(dataclasses.replace(held_out, tokenizer_hash="0"), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other\.parquet was encoded by another tokenizer"):
        audit_checkpoint(str(tiny_run.prior / "model"), tiny_run.codes["train"], tmp_path / "other.parquet")


def test_two_feature_models_of_one_name_are_refused(tiny_run, features):
    with pytest.raises(ValueError, match="expected each name once"):
        audit_checkpoint(
            str(tiny_run.prior / "model"),
            tiny_run.codes["train"],
            tiny_run.codes["validation"],
            [str(features), str(features)],
        )


def test_the_command_writes_a_report_and_pictures_and_says_what_it_decided(tiny_run, features, tmp_path, run):
    code, out, err = run(
        "audit",
        *("--model", tiny_run.prior / "model", "--samples", 6, "--limit", 8, "--features", features),
        *("--train-codes", tiny_run.codes["train"], "--held-out-codes", tiny_run.codes["validation"]),
        *("--train-images", f"folder:{tiny_run.images['train']}"),
        *("--pairs", tmp_path / "pairs", "-o", tmp_path / "report.json"),
    )
    assert code == 0, err
    report = Report.load(tmp_path / "report.json")
    assert report.value("near_samples", channel="codes") in range(7)
    assert report.tables["verdict"] in out
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["codes.png", "tiny-features.png"]
    with Image.open(tmp_path / "pairs" / "codes.png") as picture:
        assert picture.text["Comment"] == "closest pairs by codes"
        assert picture.width > 8 * 96


def test_the_command_refuses_what_it_cannot_read_in_one_line(tiny_run, tmp_path, run):
    missing = tmp_path / "missing.parquet"
    code, _, err = run("audit", "--train-codes", missing, "--held-out-codes", missing)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: ")
    assert "missing.parquet is not a file" in err


def test_of_equally_near_images_training_ones_do_not_win_by_their_place(train, held_out):
    """All images have the same codes: whose neighbour a sample is must be a toss-up, not the first one's."""
    same, others = (
        dataclasses.replace(cache, codes=np.zeros_like(cache.codes)) for cache in (train, held_out)
    )
    samples = torch.zeros(1, 4, 4, dtype=torch.long)
    rows = [compare_codes(samples, same, others, seed).neighbours[0] for seed in range(60)]
    assert 15 < sum(row >= 16 for row in rows) < 45
