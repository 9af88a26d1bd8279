"""What is measured once is kept, and differences are those of paired images, seed by seed."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

from isic_vq.models.configuration_isic_vq import IsicVQConfig
from isic_vq.models.modeling_isic_vq import IsicVQModel
from measure import (
    Difference,
    count_flops,
    flops_per_image,
    measure_chain,
    paired_difference,
    unpaired_difference,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_paired_difference_is_scipys_paired_t_interval():
    first, second = normal(40), normal(40, seed=1) + 0.5
    of = paired_difference([first], [second])
    expected = scipy.stats.ttest_rel(second.numpy(), first.numpy()).confidence_interval(0.95)
    assert of.means[0] == pytest.approx((second - first).mean().item())
    assert of.intervals[0] == pytest.approx((expected.low, expected.high))


def test_an_unpaired_difference_is_nearly_welchs():
    first, second = normal(400), normal(300, seed=1) * 2 + 0.5
    of = unpaired_difference([first], [second])
    expected = scipy.stats.ttest_ind(second.numpy(), first.numpy(), equal_var=False).confidence_interval(0.95)
    assert of.intervals[0] == pytest.approx((expected.low, expected.high), rel=0.01)


@pytest.mark.parametrize(
    ("intervals", "sign"),
    [
        ([(0.1, 0.3), (0.2, 0.9)], 1),
        ([(-0.3, -0.1), (-0.9, -0.2)], -1),
        ([(0.1, 0.3), (-0.1, 0.9)], 0),
        ([(0.1, 0.3), (-0.9, -0.1)], 0),
        ([(-0.1, 0.3), (-0.1, 0.9)], 0),
        ([(0.1, 0.3)], 0),
    ],
)
def test_something_is_said_only_where_every_seed_says_it(intervals, sign):
    of = Difference([(low + high) / 2 for low, high in intervals], intervals)
    assert of.sign == sign
    said = of.change("PSNR", "dB")
    unsaid = "the seeds do not agree on PSNR" if len(intervals) > 1 else "one seed decides nothing on PSNR"
    assert said.startswith({1: "PSNR rises by", -1: "PSNR falls by", 0: unsaid}[sign])


def test_a_change_tells_mean_and_seeds():
    assert Difference([-0.5, -1.0], [(-0.6, -0.4), (-1.1, -0.9)]).change("PSNR", "dB") == (
        "PSNR falls by 0.75 (0.50, 1.00) dB"
    )
    assert Difference([0.5, -1.0], [(0.4, 0.6), (-1.1, -0.9)]).change("x") == (
        "the seeds do not agree on x (-0.25 (+0.50, -1.00))"
    )


def test_values_are_kept_and_another_data_set_of_the_name_is_measured(tiny_run, monkeypatch):
    chain = SimpleNamespace(folder=tiny_run.prior.parent / "measured-chain", model=tiny_run.prior / "model")
    found = {uri: measure_chain(chain, "x", uri) for uri in ("synthetic:5:1", "synthetic:6:2")}
    assert {uri: len(of["psnr"]) for uri, of in found.items()} == {"synthetic:5:1": 5, "synthetic:6:2": 6}
    assert found["synthetic:5:1"]["codebook_counts"].sum() == 5 * 16
    monkeypatch.setattr("measure.load_model", None)
    again = measure_chain(chain, "x", "synthetic:5:1")
    assert all(torch.equal(again[name], of) for name, of in found["synthetic:5:1"].items())


def test_operations_are_those_of_the_convolutions():
    """A decoder's transposed convolutions and convolutions, counted by hand from their weights and output areas."""
    config = {"image_size": 16, "hidden_sizes": (6, 8), "num_codes": 8, "code_dim": 4, "residual_size": 4}
    prior = {"num_codes": 8, "grid_size": 4, "hidden_size": 8, "num_layers": 1, "head_size": 8}
    model = IsicVQModel(IsicVQConfig(vqvae_config=config, prior_config=prior)).eval()
    counted, places = 0, []

    def note(module, inputs, output):
        # Every weight meets every position once: of the input where the convolution is transposed, else of the output.
        grid = inputs[0] if isinstance(module, torch.nn.ConvTranspose2d) else output
        places.append(2 * module.weight.numel() * grid.shape[2] * grid.shape[3])

    for module in model.vqvae.decoder.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model.decode(torch.zeros(1, 4, 4, dtype=torch.int64))
    counted = sum(places)
    assert flops_per_image(model)["decoder"] == pytest.approx(counted, rel=0.02)
    assert np.isfinite(list(flops_per_image(model).values())).all()


@pytest.mark.parametrize("mask", [None, torch.ones(5, 7, dtype=torch.bool)], ids=["all", "mask"])
def test_attention_is_counted_as_its_two_products(mask):
    queries, keys = torch.ones(2, 3, 5, 4), torch.ones(2, 3, 7, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attention(queries, keys, keys, attn_mask=mask)) == 2 * 2 * (2 * 3 * 5 * 7 * 4)
