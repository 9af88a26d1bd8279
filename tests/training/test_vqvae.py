"""The tokenizer stage: its losses, the codebook's start, the averaged model, and what a run leaves behind."""

import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from skimage.metrics import structural_similarity
from torch import nn

from isic_vq.data.loading import DecodedImages
from isic_vq.data.schema import DataError
from isic_vq.evaluation.report import Report
from isic_vq.hub import load_model
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.training.loop import Trainer
from isic_vq.training.recipe import VQVAERecipe, load_recipe
from isic_vq.training.run import build_config
from isic_vq.training.vqvae import (
    VQVAETask,
    choose_model,
    flat_latents,
    open_data,
    refit_batch_norm,
    refit_codebook,
    train_vqvae,
)


@pytest.fixture
def make_task(tiny_run):
    """Tasks of the tiny recipe, with overrides, on freshly initialised models."""

    def make(*overrides):
        recipe = load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], list(overrides))
        train, validation, _ = open_data(recipe.data)
        config = build_config(VQVAEConfig, recipe.model)
        torch.manual_seed(recipe.loop.seed)
        processor = IsicVQImageProcessor(size=config.image_size)
        sets = [DecodedImages(records, processor, cache=True) for records in (train, validation)]
        return VQVAETask(VQVAEModel(config), processor, *sets, recipe)

    return make


def batch_of(task, indices):
    return task.collate([task.train_set[index] for index in indices])


def buffers(module):
    return {name: value.clone() for name, value in module.named_buffers()}


# Losses


def test_warmup_trains_a_plain_autoencoder_and_then_quantizes(make_task):
    task = make_task()
    before = task.model.quantizer.codebook.clone()
    losses = task.losses(task.model, batch_of(task, range(4)), step=1)
    assert losses["commitment_loss"] == 0
    assert torch.equal(task.model.quantizer.codebook, before), "the quantizer learns nothing before its start"
    losses = task.losses(task.model, batch_of(task, range(4)), step=2)
    assert losses["commitment_loss"] > 0


def test_loss_is_the_weighted_sum_of_its_parts(make_task):
    task = make_task("model.l1_weight=2", "model.mse_weight=3", "model.beta=0.5")
    task.model.train()
    losses = task.losses(task.model, batch_of(task, range(4)), step=2)
    expected = 2 * losses["l1_loss"] + 3 * losses["mse_loss"] + 0.5 * losses["commitment_loss"]
    assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert "ssim_loss" not in losses


def ssim(image, other):
    """Scikit-image's SSIM of two images (3, H, W), on the mirrored border too: it leaves 5 pixels out by itself."""
    image, other = (
        np.pad(x.permute(1, 2, 0).double().numpy(), ((5, 5), (5, 5), (0, 0)), mode="reflect")
        for x in (image, other)
    )
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return structural_similarity(image, other, channel_axis=-1, data_range=1.0, **options)


def test_ssim_term_is_reported_and_added_with_its_weight(make_task):
    task = make_task("ssim_weight=0.5", "augment=false")
    batch = batch_of(task, range(4))
    losses = task.losses(task.model, batch, step=0)
    reconstruction = task.model(batch["pixel_values"], quantize=False).reconstruction.detach()
    expected = np.mean([ssim(*pair) for pair in zip(batch["pixel_values"], reconstruction, strict=True)])
    assert losses["ssim_loss"].item() == pytest.approx(1 - expected, abs=1e-4)
    plain = losses["l1_loss"] + losses["mse_loss"]
    assert losses["loss"].item() == pytest.approx((plain + 0.5 * losses["ssim_loss"]).item(), rel=1e-6)
    assert losses["ssim_loss"].requires_grad


def test_augmentation_shows_other_views_at_other_steps_whatever_the_global_seed(make_task):
    def l1(task, step, seed):
        torch.manual_seed(seed)
        return task.losses(task.model.eval(), batch_of(task, range(4)), step)["l1_loss"].item()

    task, still = make_task(), make_task("augment=false")
    assert l1(task, 0, seed=1) == l1(task, 0, seed=2), "views depend on (seed, step) alone"
    assert l1(task, 0, seed=1) != l1(task, 1, seed=1)
    assert l1(still, 0, seed=1) == l1(still, 1, seed=1)


@pytest.mark.parametrize("step", [0, 2], ids=["warm-up", "quantized"])
def test_two_steps_lower_the_loss_on_one_batch(make_task, step):
    task = make_task("augment=false")
    batch = batch_of(task, range(8))
    task.before_step(step)
    task.model.train()
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-2)
    history = []
    for _ in range(3):
        loss = task.losses(task.model, batch, step)["loss"]
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert history[2] < history[0], history


# The codebook's start


def lloyd(latents, start, spares):
    """K-means in float64 numpy: the rows `start` as first centroids, `spares` for clusters that run empty."""
    centroids = latents[start]
    for spare in spares:
        nearest = ((latents[:, None] - centroids[None]) ** 2).sum(-1).argmin(1)
        centroids = np.stack(
            [
                latents[nearest == code].mean(0) if (nearest == code).any() else latents[spare[code]]
                for code in range(len(centroids))
            ]
        )
    return centroids


def test_codebook_starts_at_kmeans_centroids_when_the_warmup_is_over(make_task):
    task = make_task()
    untouched = buffers(task.model.quantizer)
    for step in (0, 1, 3):
        task.before_step(step)
        for name, value in buffers(task.model.quantizer).items():
            assert torch.equal(value, untouched[name]), f"{name} at step {step}: the start is at step 2, once"
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    task.model.train()
    with torch.no_grad():
        task.model.quantizer.eval()
        parts = [
            flat_latents(task.model, batch_of(task, order[i : i + 4])["pixel_values"])
            for i in range(0, 16, 4)
        ]
    generator = torch.Generator().manual_seed(0)
    latents = torch.cat(parts)[torch.randperm(256, generator=generator)].double().numpy()
    start = torch.randperm(256, generator=generator)[:8].numpy()
    spares = [torch.randint(256, (8,), generator=generator).numpy() for _ in range(10)]
    task.before_step(2)
    quantizer = task.model.quantizer
    np.testing.assert_allclose(
        quantizer.codebook.numpy(), lloyd(latents, start, spares), rtol=1e-3, atol=1e-4
    )
    assert quantizer.cluster_size.sum().item() == pytest.approx(4 * 16), "latents that one step brings"
    torch.testing.assert_close(quantizer.code_sums, quantizer.codebook * quantizer.cluster_size[:, None])


def test_codebook_start_is_the_same_on_every_call(make_task):
    first, second = make_task(), make_task()
    first.before_step(2)
    torch.manual_seed(99)
    second.before_step(2)
    assert torch.equal(first.model.quantizer.codebook, second.model.quantizer.codebook)


# Averaged parameters


def test_refit_batch_norm_gives_mean_and_variance_over_the_batches(make_task):
    task = make_task()
    layers = {name: m for name, m in task.model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    seen = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].numpy().copy()))
        layer.running_mean.fill_(5)
    quantizer = buffers(task.model.quantizer)
    task.model.eval()
    with torch.no_grad():
        refit_batch_norm(task.model, task.images(task.train_set))
    assert len(layers) == 8
    for name, layer in layers.items():
        assert len(seen[name]) == 4
        means = np.mean([x.mean((0, 2, 3)) for x in seen[name]], axis=0)
        variances = np.mean([np.var(x, axis=(0, 2, 3), ddof=1) for x in seen[name]], axis=0)
        np.testing.assert_allclose(layer.running_mean.numpy(), means, rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(layer.running_var.numpy(), variances, rtol=1e-4, atol=1e-6, err_msg=name)
        assert layer.momentum == 0.1, "the momentum of training comes back"
    assert not task.model.training
    for name, value in buffers(task.model.quantizer).items():
        assert torch.equal(value, quantizer[name]), f"{name}: statistics are refit, the codebook is not"


def test_refit_codebook_moves_codes_to_the_means_of_their_latents(make_task):
    task = make_task()
    task.before_step(2)
    quantizer = task.model.quantizer
    with torch.no_grad():
        quantizer.codebook[7] = 100.0  # so far away that no latent is assigned to it
        task.model.eval()
        latents = torch.cat([flat_latents(task.model, batch) for batch in task.images(task.train_set)])
    latents, old = latents.double().numpy(), quantizer.codebook.double().numpy().copy()
    nearest = ((latents[:, None] - old[None]) ** 2).sum(-1).argmin(1)
    counts = np.bincount(nearest, minlength=8)
    means = [latents[nearest == code].mean(0) if counts[code] else old[code] for code in range(8)]
    with torch.no_grad():
        refit_codebook(task.model, task.images(task.train_set))
    assert counts[7] == 0
    np.testing.assert_allclose(quantizer.codebook.numpy(), means, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(quantizer.cluster_size.numpy(), counts / 4, rtol=1e-6)


@pytest.mark.parametrize("better", ["raw", "averaged"])
def test_the_model_with_the_lower_validation_error_is_chosen(make_task, tmp_path, better):
    task = make_task("loop.max_steps=3")
    trainer = Trainer(task, task.recipe.loop, tmp_path, settings={})
    trainer.train()
    if better == "raw":
        trainer.averaged.shadow["decoder.to_pixels.bias"].fill_(10)  # all white
    else:
        spoilt = VQVAEModel.from_pretrained(tmp_path / "best")
        nn.init.constant_(spoilt.decoder.to_pixels.bias, 10)
        spoilt.save_pretrained(tmp_path / "best")
    variant, result = choose_model(task, trainer, tmp_path)
    assert variant == better
    saved = load_model(VQVAEModel, str(tmp_path / "model"))
    bias = saved.decoder.to_pixels.bias
    expected = trainer.averaged.shadow["decoder.to_pixels.bias"]
    if better == "raw":
        expected = VQVAEModel.from_pretrained(tmp_path / "best").decoder.to_pixels.bias
    assert torch.equal(bias, expected)
    assert bias.max() < 10
    pixels = torch.cat(list(task.images(task.validation_set)))
    mse = (saved.decode(saved.encode(pixels)) - pixels).square().mean().item()
    assert result.mse == pytest.approx(mse, rel=1e-5), "the numbers returned are those of the model saved"


def test_without_averaging_the_raw_model_is_chosen(make_task, tmp_path):
    task = make_task("loop.max_steps=3", "loop.average_decay=0")
    trainer = Trainer(task, task.recipe.loop, tmp_path, settings={})
    trainer.train()
    assert choose_model(task, trainer, tmp_path)[0] == "raw"


# What a run leaves behind


def test_report_holds_reconstruction_and_codebook_use(tiny_run):
    report = Report.load(tiny_run.vqvae / "report.json")
    assert report.model["type"] == "isic_vqvae"
    assert report.model["weights"] in ("raw", "averaged")
    assert {metric.name for metric in report.metrics} == {"psnr", "ssim", "l1", "mse", "usage", "perplexity"}
    assert {(metric.n, metric.split, metric.dataset) for metric in report.metrics} == {
        (16, "validation", "folder:validation")
    }
    counts = report.tables["codebook_counts"]
    assert (len(counts), sum(counts)) == (8, 16 * 4 * 4)
    assert report.value("usage") == pytest.approx(np.count_nonzero(counts) / 8)


def test_arrays_are_the_first_validation_images_and_their_reconstructions(tiny_run):
    arrays = load_file(tiny_run.vqvae / "arrays" / "reconstructions.safetensors")
    for name in ("originals", "reconstructions"):
        assert (arrays[name].shape, arrays[name].dtype) == ((12, 16, 16, 3), torch.uint8)
    processor, model = IsicVQImageProcessor(size=16), load_model(VQVAEModel, str(tiny_run.vqvae / "model"))
    paths = sorted(tiny_run.images["validation"].glob("*.png"))[:12]
    pixels = processor([str(path) for path in paths], return_tensors="pt")["pixel_values"]
    assert np.array_equal(arrays["originals"], processor.postprocess(pixels, output_type="np"))
    decoded = processor.postprocess(model.decode(model.encode(pixels)), output_type="np")
    assert np.array_equal(arrays["reconstructions"], decoded)


def test_model_folder_holds_the_processor_of_its_size(tiny_run):
    processor = IsicVQImageProcessor.from_pretrained(tiny_run.vqvae / "model")
    assert (
        processor.size["height"]
        == load_model(VQVAEModel, str(tiny_run.vqvae / "model")).config.image_size
        == 16
    )


def test_run_json_names_data_by_content_and_place_of_nothing(tiny_run):
    data = json.loads((tiny_run.vqvae / "run.json").read_text())["data"]
    assert data["train"]["name"] == "folder:train"
    assert (data["train"]["num_images"], data["validation"]["num_images"]) == (16, 16)
    assert data["train"]["fingerprint"] != data["validation"]["fingerprint"]


@pytest.mark.parametrize("stage", ["vqvae", "prior"])
def test_no_saved_file_holds_a_path_of_this_machine(tiny_run, stage):
    folder = getattr(tiny_run, stage)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    private = str(folder.parent).encode()
    holders = [path.relative_to(folder).as_posix() for path in files if private in path.read_bytes()]
    assert holders == [], "weights, configs, reports and checkpoints are published or passed on"


# Data


def test_without_validation_data_a_share_is_split_off(make_task):
    task = make_task("data.validation=null", "data.validation_share=0.3")
    assert len(task.train_set) + len(task.validation_set) == 16
    assert 0 < len(task.validation_set) < 16


def test_recipe_without_images_says_what_to_name(tmp_path):
    recipe = load_recipe(VQVAERecipe, None, [f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(
        DataError, match="data.train is not set: name your images, for example data.train=folder"
    ):
        train_vqvae(recipe)
    assert not (tmp_path / "run").exists(), "a run that cannot begin leaves no folder"


@pytest.fixture
def damaged(tiny_run, tmp_path):
    """The training images, one of them a text file."""
    folder = shutil.copytree(tiny_run.images["train"], tmp_path / "damaged")
    (folder / "003.png").write_text("this is no image")
    return folder


def test_corrupt_image_is_skipped_and_named_once(make_task, damaged, caplog):
    task = make_task(f"data.train=folder:{damaged}", "data.max_corrupt_share=0.1", "augment=false")
    with caplog.at_level(logging.WARNING, logger="isic_vq"):
        for _ in range(2):
            losses = task.losses(task.model, batch_of(task, range(4)), step=0)
    assert torch.isfinite(losses["loss"])
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [" SYNTHETIC_0_0000003"]


def test_too_many_corrupt_images_stop_the_run_by_name(make_task, damaged):
    task = make_task(f"data.train=folder:{damaged}", "data.max_corrupt_share=0.01")
    with pytest.raises(DataError, match="1 of 4 images are corrupt.*SYNTHETIC_0_0000003"):
        task.losses(task.model, batch_of(task, range(4)), step=0)


def test_batch_of_corrupt_images_alone_is_named(make_task, damaged):
    task = make_task(f"data.train=folder:{damaged}", "data.max_corrupt_share=0.1")
    with pytest.raises(
        DataError, match="every image of a batch is corrupt .SYNTHETIC_0_0000003.*loop.batch_size"
    ):
        task.losses(task.model, batch_of(task, [3]), step=0)
