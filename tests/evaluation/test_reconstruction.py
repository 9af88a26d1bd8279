"""Reconstruction metrics against scikit-image and numpy; codebook use over a data set, whatever its batches."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measures import MS_SSIM_MIN_SIZE, MS_SSIM_WEIGHTS, ms_ssim, psnr
from isic_vq.evaluation.reconstruction import (
    batch_statistics,
    evaluate_reconstruction,
    psnr_by_batch_statistics,
    reconstruction_metrics,
)
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.modeling_vqvae import VQVAEModel

NUM_CODES = 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = VQVAEConfig(image_size=64, hidden_sizes=(4, 8), residual_size=4, num_codes=NUM_CODES, code_dim=4)
    return VQVAEModel(config).eval()


@pytest.fixture(scope="module")
def pixel_values():
    return torch.rand(7, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def pairs(model, pixel_values):
    """Images and reconstructions as scikit-image takes them: float64, channels last."""
    reconstructions = model.decode(model.encode(pixel_values))
    return [
        tuple(x.permute(1, 2, 0).double().numpy() for x in pair)
        for pair in zip(pixel_values, reconstructions, strict=True)
    ]


def ssim(image, other):
    """Scikit-image's SSIM on the mirrored border too: it leaves 5 pixels out by itself."""
    image, other = (np.pad(x, ((5, 5), (5, 5), (0, 0)), mode="reflect") for x in (image, other))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return structural_similarity(image, other, channel_axis=-1, data_range=1.0, **options)


def test_psnr_is_scikit_images_per_image(model, pixel_values):
    found = psnr(pixel_values, model.decode(model.encode(pixel_values)))
    expected = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in pairs(model, pixel_values)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_psnr_of_a_known_error():
    black = torch.zeros(1, 3, 4, 4)
    assert psnr(black, black + 0.1).item() == pytest.approx(20.0, abs=1e-4), "10 log10(1 / 0.01)"
    assert psnr(black, black + 1).item() == pytest.approx(0.0)


def test_means_over_images_are_scikit_images(model, pixel_values):
    result = evaluate_reconstruction(model, pixel_values.split(3))
    both = pairs(model, pixel_values)
    assert result.num_images == 7
    expected = {
        "psnr": np.mean([peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in both]),
        "ssim": np.mean([ssim(a, b) for a, b in both]),
        "l1": np.mean([np.abs(a - b).mean() for a, b in both]),
        "mse": np.mean([((a - b) ** 2).mean() for a, b in both]),
    }
    for name, value in expected.items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-4), name


def test_psnr_is_averaged_over_images_not_computed_from_the_mean_error(model, pixel_values):
    mixed = torch.cat([pixel_values[:1], torch.full((1, 3, 64, 64), 0.5)])
    result = evaluate_reconstruction(model, [mixed])
    assert result.psnr != pytest.approx(-10 * math.log10(result.mse), abs=1e-3)


def test_codebook_use_is_counted_over_the_data_set(model, pixel_values):
    result = evaluate_reconstruction(model, pixel_values.split(2))
    counts = np.bincount(model.encode(pixel_values).flatten().numpy(), minlength=NUM_CODES)
    assert result.codebook_counts == counts.tolist()
    assert sum(result.codebook_counts) == 7 * 16 * 16
    shares = counts[counts > 0] / counts.sum()
    assert result.perplexity == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    assert result.usage == np.count_nonzero(counts) / NUM_CODES


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_numbers_do_not_depend_on_the_batch_size(model, pixel_values, batch_size):
    whole, cut = (evaluate_reconstruction(model, pixel_values.split(size)) for size in (4, batch_size))
    for name in ("psnr", "ssim", "l1", "mse", "usage", "perplexity"):
        assert getattr(cut, name) == pytest.approx(getattr(whole, name), rel=1e-5), (
            f"{name}: a mean of batch means, or a perplexity per batch, would move with the batch size"
        )


def test_model_measures_in_eval_mode_and_learns_nothing(model, pixel_values):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    evaluate_reconstruction(model, [pixel_values])
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_nothing_to_measure_is_an_error(model):
    with pytest.raises(ValueError, match="there are no images to reconstruct"):
        evaluate_reconstruction(model, [])


def test_report_lines_carry_unit_count_split_and_data_set(model, pixel_values):
    result = evaluate_reconstruction(model, [pixel_values])
    metrics = {
        metric.text: metric for metric in reconstruction_metrics(result, MeasuredOn("test", "folder:mine"))
    }
    assert {name: metric.unit for name, metric in metrics.items()} == {
        "psnr": "dB",
        "ssim": "1",
        "l1": "pixel value in [0, 1]",
        "mse": "squared pixel value in [0, 1]",
        "usage": "share of codes",
        "perplexity": "codes",
    }
    for name, metric in metrics.items():
        assert metric.value == getattr(result, name)
        assert (metric.n, metric.split, metric.dataset, metric.seed) == (7, "test", "folder:mine", None)


def contrast_structure_and_ssim(a, b):
    """SSIM and its contrast-structure term as maps, float64 of one channel, by Wang et al. 2003 with scipy's filter."""

    def blurred(x):
        return gaussian_filter(x, 1.5, radius=5, mode="mirror")

    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b, cov = (
        blurred(a * a) - mean_a**2,
        blurred(b * b) - mean_b**2,
        blurred(a * b) - mean_a * mean_b,
    )
    structure = (2 * cov + 0.03**2) / (var_a + var_b + 0.03**2)
    return structure, structure * (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)


def test_ms_ssim_is_the_product_over_four_scales():
    """Contrast-structure at three scales, SSIM at the coarsest; 2x2 means between them; borders left out."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 128, 128, generator=generator).cumsum(-1) / 128
    others = (images + 0.05 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    weights = np.array(MS_SSIM_WEIGHTS) / sum(MS_SSIM_WEIGHTS)
    for image, other, found in zip(
        images.double().numpy(), others.double().numpy(), ms_ssim(images, others), strict=True
    ):
        expected = 1.0
        for scale, weight in enumerate(weights):
            maps = [contrast_structure_and_ssim(a, b) for a, b in zip(image, other, strict=True)]
            term = np.mean([pair[scale == 3][5:-5, 5:-5] for pair in maps])
            expected *= term**weight
            image, other = (x.reshape(3, len(x[0]) // 2, 2, -1, 2).mean((2, 4)) for x in (image, other))
        assert found.item() == pytest.approx(expected, abs=2e-3)


def test_ms_ssim_of_equal_images_is_one_at_the_least_size_that_is_allowed():
    images = torch.rand(2, 3, MS_SSIM_MIN_SIZE, MS_SSIM_MIN_SIZE)
    assert ms_ssim(images, images).tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="larger than"):
        ms_ssim(images[..., 1:, 1:], images[..., 1:, 1:])


# --- as in training ----------------------------------------------------------------------------------------------------


def test_batch_statistics_are_each_batchs_own_and_leave_the_running_ones(model, pixel_values):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    values = psnr_by_batch_statistics(model, pixel_values.split(4))
    trained = copy.deepcopy(model).train()
    expected = []
    for batch in pixel_values.split(4):
        codes = model.quantizer.encode(trained.encoder(batch))
        expected.append(psnr(batch, trained.decoder(model.quantizer.lookup(codes))))
    assert torch.allclose(values, torch.cat(expected).double(), atol=1e-4)
    assert not torch.allclose(
        values, evaluate_reconstruction(model, [pixel_values]).values["psnr"], atol=0.01
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_norms_return_to_what_they_were_even_after_an_error(model):
    states = [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()]
    with pytest.raises(ValueError, match="expected"), batch_statistics(model):
        model.embed(torch.zeros(2, 3, 5, 5))
    assert states == [
        (module.training, getattr(module, "track_running_stats", None)) for module in model.modules()
    ]
