"""The shipped checkpoints: load whole and in parts, are as good as their reports say, and generate repeatably."""

from itertools import pairwise

import pytest
import torch

from isic_vq.data.loading import iter_batches
from isic_vq.data.sources import open_source
from isic_vq.evaluation.reconstruction import evaluate_reconstruction
from isic_vq.evaluation.report import Report
from isic_vq.hub.pretrained import default_checkpoint, load_model
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_vqvae import VQVAEModel

SHIPPED = sorted(path.parent for path in default_checkpoint().parent.glob("*/model_index.json"))


@pytest.fixture(scope="module", params=SHIPPED, ids=lambda path: path.name)
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def model(folder):
    return load_model(IsicVQModel, str(folder))


@pytest.fixture(scope="module")
def report(folder):
    return Report.load(folder / "reports" / "evaluation.json")


def test_parts_load_alone_without_missing_or_unexpected_keys_and_equal_the_whole(model, folder):
    for part in (model.vqvae, model.prior):
        loaded, info = type(part).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        state = part.state_dict()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, state[name]), name


def test_saving_and_loading_changes_no_output_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = load_model(IsicVQModel, str(tmp_path))
    first, second = (m.generate(2, "melanoma", seed=3) for m in (model, again))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.pixel_values, second.pixel_values)


def test_the_same_seed_gives_the_same_image_and_another_seed_another(model):
    first, again, other = (model.generate(1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.pixel_values, again.pixel_values)
    assert not torch.equal(first.codes, other.codes)


def test_it_is_conditional_on_the_seven_ham10000_diagnoses(model):
    assert sorted(model.config.class_names.values()) == [
        "actinic_keratosis",
        "basal_cell_carcinoma",
        "benign_keratosis",
        "dermatofibroma",
        "melanoma",
        "nevus",
        "vascular_lesion",
    ]


def test_the_report_meets_what_the_release_asks_for(report):
    assert report.value("psnr", "validation") >= 30
    assert report.value("usage", "validation") >= 0.85


def test_the_pixelcnn_saves_two_bits_of_every_code():
    report = Report.load(default_checkpoint() / "reports" / "evaluation.json")
    values = [report.value(name, "validation") for name in ("bits_per_code_unigram", "bits_per_code")]
    assert values[0] - values[1] >= 2.0


@pytest.mark.slow
@pytest.mark.real_data
def test_each_scale_brings_real_images_nearer(data_dir):
    """The VAR's tokenizer: mean squared error of images of codes of its first k scales, k = 1, 2, ..."""
    (folder,) = (path for path in SHIPPED if path.name.endswith("-var"))
    tokenizer = load_model(VQVAEModel, str(folder)).eval()
    records = open_source(f"parquet:{data_dir}/ham10000/validation-*.parquet")
    processor = IsicVQImageProcessor(size=tokenizer.config.image_size)
    images = next(iter_batches(records, processor, batch_size=64))["pixel_values"]
    with torch.no_grad():
        previews = tokenizer.decode_progressively(tokenizer.encode(images))
    errors = [(preview - images).square().mean().item() for preview in previews]
    assert len(errors) == len(tokenizer.config.scales) == 8
    assert all(finer < coarser for coarser, finer in pairwise(errors)), errors


@pytest.mark.real_data
@pytest.mark.slow
def test_the_reported_reconstruction_is_measured_again_on_the_real_validation_images(model, report, data_dir):
    records = open_source(f"parquet:{data_dir}/ham10000/validation-*.parquet")
    processor = IsicVQImageProcessor(size=model.config.vqvae_config.image_size)
    batches = (batch["pixel_values"] for batch in iter_batches(records, processor, batch_size=32))
    result = evaluate_reconstruction(model.vqvae, batches)
    assert result.num_images == 597
    assert result.psnr == pytest.approx(report.value("psnr", "validation"), abs=0.01)
    assert result.ssim == pytest.approx(report.value("ssim", "validation"), abs=0.001)
    assert result.usage == pytest.approx(report.value("usage", "validation"), abs=0.005)
