"""Distances in a user's feature space, against formulas written out in numpy."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from transformers import ResNetConfig, ResNetForImageClassification

from isic_vq.evaluation.features import FeatureModel, feature_distance, measure_features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny image classifier as a user would have saved it."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", num_labels=2
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "size": {"shortest_edge": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def features(folder):
    return FeatureModel.from_pretrained(str(folder))


def test_images_reach_the_backbone_normalised(features):
    images = torch.rand(2, 3, 32, 32)
    mean, std = (np.array(v).reshape(1, 3, 1, 1) for v in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    expected = torch.from_numpy((images.numpy() - mean) / std).float()
    direct = features.backbone(expected).pooler_output.flatten(1)
    torch.testing.assert_close(features(images), direct)
    assert features.num_features == direct.shape[1] == 6


def test_images_of_another_size_are_resized(features):
    flat = torch.full((1, 3, 48, 48), 0.3)
    torch.testing.assert_close(features(flat), features(flat[:, :, :32, :32]), atol=1e-5, rtol=1e-5)


def test_feature_model_stays_frozen_and_in_eval_mode(features):
    features.train()
    assert not any(module.training for module in features.modules())
    assert not any(parameter.requires_grad for parameter in features.parameters())


def test_feature_distance_is_the_formula(features):
    a, b = torch.rand(2, 3, 3, 32, 32)
    expected = np.zeros(3)
    maps = list(zip(features.maps(a), features.maps(b), strict=True))
    for x, y in maps:
        x, y = x.double().numpy(), y.double().numpy()
        x, y = (v / np.linalg.norm(v, axis=1, keepdims=True).clip(1e-12) for v in (x, y))
        expected += ((x - y) ** 2).sum(axis=1).mean(axis=(1, 2)) / len(maps)
    np.testing.assert_allclose(feature_distance(features, a, b).numpy(), expected, rtol=1e-5)
    assert len(maps) == 3, "the stem and two stages"


def test_feature_distance_sends_gradients_to_the_images(features):
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    feature_distance(features, torch.rand(1, 3, 32, 32), images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_measures_equal_numpy_over_batches(features):
    images, others = torch.rand(40, 3, 32, 32), torch.rand(40, 3, 32, 32) ** 2
    result = measure_features(features, zip(images.split(16), others.split(16), strict=True))
    with torch.no_grad():
        x, y = (features(v).double().numpy() for v in (images, others))
        paired = feature_distance(features, images, others).mean().item()
    covariances = [np.cov(v, rowvar=False) for v in (x, y)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    frechet = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert result["feature_distance"] == pytest.approx(paired, rel=1e-5)
    assert result["frechet_distance"] == pytest.approx(frechet, rel=1e-3)


def test_measuring_leaves_the_feature_model_as_it_was(features):
    before = {name: value.clone() for name, value in features.state_dict().items()}
    measure_features(features, [(torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32))])
    for name, value in features.state_dict().items():
        assert value.dtype == before[name].dtype, name
        assert torch.equal(value, before[name]), name
        assert not value.is_inference(), name


def test_identical_images_are_at_distance_zero(features):
    images = torch.rand(8, 3, 32, 32)
    result = measure_features(features, [(images, images)])
    assert result["feature_distance"] == 0
    assert result["frechet_distance"] == pytest.approx(0, abs=1e-4)


def test_one_image_has_no_covariance(features):
    with pytest.raises(ValueError, match="1 images have no covariance"):
        measure_features(features, [(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))])


def test_pickled_weights_are_refused(folder, tmp_path):
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError):
        FeatureModel.from_pretrained(str(tmp_path))


def test_backbone_without_some_of_its_weights_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(
        {n: v for n, v in weights.items() if "stages.1" not in n}, tmp_path / "model" / "model.safetensors"
    )
    with pytest.raises(ValueError, match="it lacks"):
        FeatureModel.from_pretrained(str(tmp_path / "model"))
