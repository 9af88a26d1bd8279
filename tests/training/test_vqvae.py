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

from isic_vq.data.augmentation import dihedral, random_views
from isic_vq.data.loading import collate
from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source
from isic_vq.evaluation.report import Report
from isic_vq.hub.pretrained import load_model
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.training.load import load_recipe
from isic_vq.training.loop import Trainer
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import RecipeError, VQVAERecipe
from isic_vq.training.run import Run
from isic_vq.training.vqvae import (
    open_task,
    refit_batch_norm,
    refit_codebook,
    rows_to_learn,
    train_vqvae,
)


@pytest.fixture
def make_task(make_vqvae_task, tmp_path):
    """Tasks of the tiny recipe, ready for their first epoch."""

    def make(*overrides):
        task = make_vqvae_task(*overrides)
        task.begin(Processes(task.recipe.loop, tmp_path))
        task.before_epoch(0)
        return task

    return make


@pytest.fixture
def make_vqvae_trainer(make_vqvae_task, tmp_path):
    """Trainers of the tiny recipe, with overrides, in this test's folder."""

    def make(*overrides):
        task = make_vqvae_task(*overrides)
        loop = task.recipe.loop
        return Trainer(task, loop, Run(tmp_path, "0123abcd"), Processes(loop, tmp_path), settings={})

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


def test_ssim_term_is_in_float32_under_autocast(make_task):
    """In bfloat16 its variances are noise: a run trained with it stayed at 23 dB where others reached 30."""
    task = make_task("ssim_weight=0.5", "augment=false")
    batch, seen = batch_of(task, range(4)), []

    def spy(pixel_values, quantize):
        output = task.model(pixel_values, quantize=quantize)
        output.reconstruction = (pixel_values + 0.02 * output.reconstruction.float()).bfloat16()
        seen.append(output.reconstruction.detach().float())
        return output

    with torch.autocast("cpu", torch.bfloat16):
        losses = task.losses(spy, batch, 0)
    expected = np.mean([ssim(*pair) for pair in zip(batch["pixel_values"], seen[0], strict=True)])
    assert losses["ssim_loss"].item() == pytest.approx(1 - expected, abs=1e-3)


def test_in_the_last_steps_batch_norm_is_as_it_will_be_used(make_task):
    task = make_task("frozen_norm_steps=2", "loop.max_steps=6", "augment=false")
    batch = batch_of(task, range(4))
    task.model.train()
    task.before_step(3)
    task.losses(task.model, batch, 3)
    norms = {name: value for name, value in buffers(task.model).items() if "running" in name}
    task.before_step(4)
    losses = task.losses(task.model, batch, 4)
    assert all(torch.equal(value, buffers(task.model)[name]) for name, value in norms.items())
    assert task.model.training, "all else learns on"
    assert task.model.quantizer.training
    output = task.model.eval()(batch["pixel_values"])
    assert losses["loss"].item() == pytest.approx(output.loss.item(), rel=1e-5)


def test_frozen_statistics_are_kept_for_averaged_parameters(make_task):
    for steps, kept in ((0, False), (2, True)):
        task = make_task(f"frozen_norm_steps={steps}", "loop.max_steps=6")
        before = buffers(task.model.decoder)
        task.refit_statistics()
        same = [torch.equal(value, buffers(task.model.decoder)[name]) for name, value in before.items()]
        assert all(same) == kept


def test_more_frozen_steps_than_there_are_is_refused(make_task):
    with pytest.raises(RecipeError, match="frozen_norm_steps is 5: expected at least 0 and no more than"):
        make_task("frozen_norm_steps=5", "loop.max_steps=6")


def shown_in(task, indices, step=0):
    """The pixels in which each image enters a step, by index."""
    shown = []

    def spy(pixel_values, quantize):
        shown.append(pixel_values)
        return task.model(pixel_values, quantize=quantize)

    task.losses(spy, batch_of(task, indices), step)
    return dict(zip(indices, shown[0], strict=True))


def test_view_of_an_image_depends_on_seed_epoch_and_index_alone(make_task):
    task = make_task()
    first = shown_in(task, list(range(16)))
    torch.manual_seed(99)
    again = make_task()
    for part in ([5, 0, 11], [11, 4, 3, 2, 1], list(range(15, -1, -1))):
        for index, pixels in shown_in(again, part, step=1).items():
            assert torch.equal(pixels, first[index]), "whatever the batch, its order and the step"
    expected = random_views(16, seed=0, epoch=0)
    for index, pixels in first.items():
        upright = collate([task.train_set[index]])["pixel_values"]
        turned = dihedral(upright, expected[index][None])[0]
        assert torch.equal(pixels, turned)


def differing(first, second):
    return sum(not torch.equal(first[index], second[index]) for index in first)


def test_other_epochs_and_seeds_show_other_views(make_task):
    task, still = make_task(), make_task("augment=false")
    first, unturned = shown_in(task, list(range(16))), shown_in(still, list(range(16)))
    for made in (task, still):
        made.before_epoch(1)
    assert differing(first, shown_in(task, list(range(16)))) > 4
    assert differing(first, shown_in(make_task("loop.seed=1"), list(range(16)))) > 4
    assert differing(unturned, shown_in(still, list(range(16)))) == 0


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
            rows_to_learn(task.model, collate([task.train_set[j] for j in order[i : i + 4]])["pixel_values"])
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


def test_more_codes_than_the_kmeans_start_has_latents_are_refused_before_the_first_step(tiny_run, tmp_path):
    recipe = load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], [f"output_dir={tmp_path / 'run'}"])
    recipe.model["num_codes"] = 256  # of 16 images with 16 codes each
    open_task(recipe)
    recipe.model["num_codes"] = 257
    with pytest.raises(
        RecipeError, match="num_codes is 257: expected at most 256, the latents of the 16 images"
    ):
        train_vqvae(recipe)
    assert not (tmp_path / "run").exists()
    recipe.codebook_start = "random"
    open_task(recipe)


def test_codebook_start_is_the_same_on_every_call(make_task):
    first, second = make_task(), make_task()
    first.before_step(2)
    torch.manual_seed(99)
    second.before_step(2)
    assert torch.equal(first.model.quantizer.codebook, second.model.quantizer.codebook)


def test_logged_perplexity_is_that_of_the_codes_of_the_step(make_vqvae_trainer, tmp_path):
    trainer = make_vqvae_trainer("loop.max_steps=5", "loop.accumulation_steps=2", "codebook_warmup_steps=2")
    passes = []
    trainer.task.model.register_forward_hook(lambda module, args, output: passes.append(output.codes))
    for _ in trainer.steps():
        pass
    steps = [passes[2 * step : 2 * step + 2] for step in range(5)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [line.get("perplexity") for line in lines if line["kind"] == "batch"]
    assert logged[:2] == [None, None], "nothing is quantized in the warm-up"
    for codes, perplexity in zip(steps[2:], logged[2:], strict=True):
        shares = np.bincount(torch.cat(codes).numpy().ravel()) / (4 * 16)
        shares = shares[shares > 0]
        assert perplexity == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)
    assert len(set(logged[2:])) == 3


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
        latents = torch.cat([rows_to_learn(task.model, batch) for batch in task.images(task.train_set)])
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
def test_the_model_with_the_lower_validation_error_is_chosen(make_vqvae_trainer, tmp_path, better):
    trainer = make_vqvae_trainer("loop.max_steps=3")
    task = trainer.task
    trainer.train()
    if better == "raw":
        trainer.averaged.shadow["decoder.to_pixels.bias"].fill_(10)  # all white
    else:
        spoilt = VQVAEModel.from_pretrained(tmp_path / "best")
        nn.init.constant_(spoilt.decoder.to_pixels.bias, 10)
        spoilt.save_pretrained(tmp_path / "best")
    task.sources = {"train": find_source("synthetic:4:0").describe()}
    assert task.choose_best(trainer, "mse_loss", "vqvae") == better
    saved = load_model(VQVAEModel, str(tmp_path / "model"))
    bias = saved.decoder.to_pixels.bias
    expected = trainer.averaged.shadow["decoder.to_pixels.bias"]
    if better == "raw":
        expected = VQVAEModel.from_pretrained(tmp_path / "best").decoder.to_pixels.bias
    assert torch.equal(bias, expected)
    assert bias.max() < 10
    pixels = torch.cat(list(task.images(task.validation_set)))
    mse = (saved.decode(saved.encode(pixels)) - pixels).square().mean().item()
    assert task.validated.mse == pytest.approx(mse, rel=1e-5), (
        "the numbers returned are those of the model saved"
    )


def test_without_averaging_the_raw_model_is_chosen(make_vqvae_trainer):
    trainer = make_vqvae_trainer("loop.max_steps=3", "loop.average_decay=0")
    trainer.train()
    trainer.task.sources = {"train": find_source("synthetic:4:0").describe()}
    assert trainer.task.choose_best(trainer, "mse_loss", "vqvae") == "raw"


# Pictures


def test_pictures_are_pairs_of_validation_images_and_the_use_of_the_codebook(make_task):
    task = make_task()
    task.validate()
    pictures = task.pictures()
    assert set(pictures) == {"reconstructions", "codebook"}
    shown = np.asarray(pictures["reconstructions"])
    pixels = torch.cat(list(task.images(task.validation_set)))[:12]
    for images in (pixels, task.model.decode(task.model.encode(pixels))):
        for image in task.processor.postprocess(images, output_type="np"):
            assert holds(shown, image)
    assert min(pictures["codebook"].size) > 200
    assert pictures["codebook"].mode == "RGB"


def holds(picture, image):
    """Whether an image appears in a picture pixel for pixel."""
    height, width, _ = image.shape
    places = np.lib.stride_tricks.sliding_window_view(picture, (height, width, 3))
    return (places == image).all((-1, -2, -3)).any()


# What a run leaves behind


def test_report_holds_reconstruction_and_codebook_use(tiny_run):
    report = Report.load(tiny_run.vqvae / "report.json")
    assert report.model["type"] == "isic_vqvae"
    assert report.model["weights"] in ("raw", "averaged")
    assert {metric.text for metric in report.metrics} == {"psnr", "ssim", "l1", "mse", "usage", "perplexity"}
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
            batch = batch_of(task, range(4))
            task.check(batch)
    assert (batch["size"], len(batch["pixel_values"])) == (3, 3)
    assert torch.isfinite(task.losses(task.model, batch, step=0)["loss"])
    assert [record.getMessage().split(":")[1] for record in caplog.records] == [" SYNTHETIC_0_0000003"]


def test_too_many_corrupt_images_stop_the_run_by_name(make_task, damaged):
    task = make_task(f"data.train=folder:{damaged}", "data.max_corrupt_share=0.01")
    with pytest.raises(DataError, match="1 of 4 images are corrupt.*SYNTHETIC_0_0000003"):
        task.check(batch_of(task, range(4)))


def test_batch_of_corrupt_images_alone_is_named(make_task, damaged):
    task = make_task(f"data.train=folder:{damaged}", "data.max_corrupt_share=0.1")
    with pytest.raises(
        DataError, match="every image of a batch is corrupt .SYNTHETIC_0_0000003.*loop.batch_size"
    ):
        task.check(batch_of(task, [3]))
