"""What a model costs, against its files and its own arithmetic."""

import math

import pytest
import torch
from safetensors.torch import load_file

from isic_vq.evaluation.cost import BATCH_SIZES, REPEATS, cost_metrics, seconds
from isic_vq.models.configuration_isic_vq import IsicVQConfig
from isic_vq.models.modeling_isic_vq import IsicVQModel

VQVAE = {"image_size": 16, "hidden_sizes": (4, 4), "residual_size": 4, "num_codes": 8, "code_dim": 4}
PRIOR = {"num_codes": 8, "grid_size": 4, "hidden_size": 8, "num_layers": 1, "head_size": 8}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return IsicVQModel(IsicVQConfig(vqvae_config=VQVAE, prior_config=PRIOR)).eval()


@pytest.fixture(scope="module")
def found(model):
    return {metric.text: metric for metric in cost_metrics(model, bits_per_code=2.5)}


def test_parameters_and_bytes_are_those_of_the_saved_file(model, found, tmp_path):
    model.save_pretrained(tmp_path)
    for part in ("vqvae", "prior"):
        (file,) = (tmp_path / part).glob("*.safetensors")
        assert found[f"weight_bytes[{part}]"].value == sum(t.nbytes for t in load_file(file).values())
        trained = sum(parameter.numel() for parameter in getattr(model, part).parameters())
        assert found[f"parameters[{part}]"].value == trained
        assert type(found[f"parameters[{part}]"].value) is int


def test_bytes_per_image_are_bits_of_all_positions(found):
    assert found["bytes_per_image_flat"].value == 16 * math.log2(8) / 8
    assert found["bytes_per_image_prior"].value == pytest.approx(16 * 2.5 / 8)


def test_every_action_is_timed_per_image_at_every_batch(found):
    timed = {name: metric for name, metric in found.items() if name.startswith("seconds_per_image")}
    assert set(timed) == {
        f"seconds_per_image[{action}, batch={batch}]"
        for action in ("generate", "encode", "decode")
        for batch in BATCH_SIZES
    }
    assert all(
        metric.value > 0 and metric.n == REPEATS and metric.unit == "s per image" for metric in timed.values()
    )
    assert all(metric.group is None for metric in timed.values()), "a batch is no part of the images"


def test_the_first_run_is_not_counted(monkeypatch):
    clock, runs = iter(range(1000)), []
    monkeypatch.setattr("isic_vq.evaluation.cost.time.perf_counter", lambda: float(next(clock)) ** 2)
    times = seconds(lambda: runs.append(1), torch.device("cpu"))
    assert len(runs) == REPEATS + 1
    assert times.tolist() == [(2 * k + 1) ** 2 - (2 * k) ** 2 for k in range(1, REPEATS + 1)]
