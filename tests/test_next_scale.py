"""A tokenizer with scales and a VAR, where a tokenizer and a PixelCNN are expected: every command, by the config alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, pipeline

from isic_vq import IsicVQModel, IsicVQPipeline, VARModel
from isic_vq.codec.codec import compress
from isic_vq.codec.container import CodecError
from isic_vq.data.code_cache import read_code_cache, tokenizer_hash
from isic_vq.evaluation.report import Report
from isic_vq.hub.pretrained import load_model
from isic_vq.training.load import load_recipe
from isic_vq.training.prior import train_prior
from isic_vq.training.recipe import PriorRecipe


@pytest.fixture(scope="module")
def folder(var_run):
    return var_run.prior / "model"


@pytest.fixture(scope="module")
def model(folder):
    return load_model(IsicVQModel, str(folder)).eval()


def test_the_run_leaves_a_var_that_fits_its_tokenizer(var_run, model):
    assert isinstance(model.prior, VARModel)
    config = model.config.prior_config
    assert (config.scales, config.code_dim, config.num_codes) == ([1, 2, 4], 4, 8)
    losses = [
        json.loads(line)["loss"]
        for line in (var_run.prior / "metrics.jsonl").read_text().splitlines()
        if '"batch"' in line
    ]
    assert len(losses) == 6
    assert all(np.isfinite(losses))


def test_the_code_cache_holds_all_scales_of_all_views(var_run, model):
    cache = read_code_cache(var_run.codes["train"])
    assert cache.codes.shape == (16, 8, 21)
    assert cache.tokenizer_hash == tokenizer_hash(model.vqvae)
    before = tokenizer_hash(model.vqvae)
    changed = load_model(IsicVQModel, str(var_run.prior / "model")).vqvae
    with torch.no_grad():
        changed.quantizer.phi[1].weight.add_(0.1)
    assert tokenizer_hash(changed) != before, "what lies between scales decides codes"


def test_transformers_pipeline_and_auto_model_open_it(folder):
    made = pipeline("unconditional-image-generation", str(folder))(num_images=2, seed=0)
    assert [image.size for image in made] == [(16, 16)] * 2
    assert isinstance(AutoModel.from_pretrained(folder).prior, VARModel)


def test_diffusers_pipeline_counts_scales(folder):
    steps = []
    pipe = IsicVQPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        num_images=2,
        seed=0,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, time, values: steps.append(step),
    )
    assert output.images.shape == (2, 21)
    assert steps == [0, 1, 2]


def test_commands_that_make_images(run, folder, var_run, tmp_path):
    code, _, stderr = run(
        "generate", "-m", folder, "-n", 3, "--seed", 1, "-l", "nevus", "-o", tmp_path / "made"
    )
    assert code == 0, stderr
    assert len(list((tmp_path / "made").glob("*.png"))) == 4
    image = next(var_run.images["validation"].glob("*.png"))
    code, _, stderr = run(
        "edit", image, "-m", folder, "--box", "4,4,12,12", "-n", 2, "-o", tmp_path / "edited"
    )
    assert code == 0, stderr
    code, _, stderr = run("reconstruct", image, "-m", folder, "-o", tmp_path / "back")
    assert code == 0, stderr


def test_score_draws_its_maps(run, folder, var_run, tmp_path):
    code, stdout, stderr = run(
        "score", f"folder:{var_run.images['validation']}", "-m", folder,
        "--train-codes", var_run.codes["train"], "-o", tmp_path / "scores",
    )  # fmt: skip
    assert code == 0, stderr
    assert (tmp_path / "scores" / "overview.png").is_file()


def test_evaluate_counts_all_codes(run, folder, var_run, model, tmp_path):
    code, _, stderr = run(
        "evaluate", folder, "--data", f"validation=folder:{var_run.images['validation']}",
        "--train-codes", var_run.codes["train"], "--out", tmp_path / "evaluation.json",
    )  # fmt: skip
    assert code == 0, stderr
    report = Report.load(tmp_path / "evaluation.json")
    assert report.model["prior"] == "isic_var"
    name = next(metric.dataset for metric in report.metrics if metric.split == "validation")
    bits = report.value("bits_per_code", "validation", name)
    assert report.value("bits_per_pixel", "validation", name) == pytest.approx(bits * 21 / 16**2)
    assert report.value("bytes_per_image_flat") == 21 * 3 / 8
    cached = read_code_cache(var_run.codes["validation"])
    codes = torch.from_numpy(cached.codes[:, 0].astype("int64"))
    counts = torch.tensor(report.tables["validation"]["codebook_counts"])
    assert torch.equal(counts, torch.bincount(codes.flatten(), minlength=8))


def test_audit_compares_all_codes(run, folder, var_run, tmp_path):
    code, stdout, stderr = run(
        "audit", "-m", folder, "--samples", 6, "--limit", 8, "--train-codes", var_run.codes["train"],
        "--held-out-codes", var_run.codes["validation"], "--out", tmp_path / "audit.json",
    )  # fmt: skip
    assert code == 0, stderr


def test_info_and_export(run, folder, var_run, tmp_path):
    code, stdout, stderr = run("info", folder)
    assert code == 0, stderr
    assert "16 px -> 1x1 + 2x2 + 4x4 codes of 8" in stdout
    assert "prior      var, " in stdout
    code, _, stderr = run("export", folder, tmp_path / "card", "--train-codes", var_run.codes["train"])
    assert code == 0, stderr
    made = AutoModel.from_pretrained(tmp_path / "card")
    assert isinstance(made.prior, VARModel)


def test_the_codec_says_that_it_takes_one_grid(model):
    with pytest.raises(CodecError, match="the model's prior is isic_var: name one whose prior is a PixelCNN"):
        compress(model, torch.zeros(1, 21, dtype=torch.long), ["a.png"])


def test_training_again_leaves_the_same_bytes(var_run, tmp_path):
    train_prior(load_recipe(PriorRecipe, var_run.configs["prior"], [f"output_dir={tmp_path}"]))
    first, second = (
        (run / "model" / "prior" / "model.safetensors").read_bytes() for run in (var_run.prior, tmp_path)
    )
    assert first == second


def test_a_pixelcnn_recipe_on_codes_of_scales_is_refused(var_run, tmp_path):
    overrides = [
        f"output_dir={tmp_path}",
        "model={hidden_size: 8, num_layers: 1, first_kernel_size: 3, head_size: 8}",
    ]
    with pytest.raises(ValueError, match="the tokenizer makes 21 codes but the prior models 4x4"):
        train_prior(load_recipe(PriorRecipe, var_run.configs["prior"], overrides))


def test_progressive_previews_are_images(model, var_run):
    path = next(var_run.images["validation"].glob("*.png"))
    pixels = torch.from_numpy(np.array(Image.open(path).resize((16, 16)))).permute(2, 0, 1)[None] / 255
    codes = model.encode(pixels)
    previews = model.vqvae.decode_progressively(codes)
    for preview, length in zip(previews, (1, 5, 21), strict=True):
        assert torch.equal(preview, model.decode(codes[:, :length]))
    torch.testing.assert_close(previews[-1], model.decode(codes))
    assert len({preview.sum().item() for preview in previews}) == 3
