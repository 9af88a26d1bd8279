"""The fine-tuning stage: what it trains, what it leaves alone, and what it reports."""

import csv
import json
import shutil

import pytest
import torch
from run_folder import records

from isic_vq.data.code_cache import tokenizer_hash
from isic_vq.data.schema import DataError
from isic_vq.evaluation.report import Report
from isic_vq.figures import write_figures
from isic_vq.hub import ModelError, load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.training.decoder import train_decoder
from isic_vq.training.loop import InterruptedTraining
from isic_vq.training.recipe import DecoderRecipe, load_recipe


@pytest.fixture
def make_recipe(decoder_settings, tmp_path):
    def make(*overrides):
        settings = [f"output_dir={tmp_path / 'run'}", *decoder_settings, *overrides]
        return load_recipe(DecoderRecipe, None, settings)

    return make


def test_only_the_decoders_weights_change(make_recipe, parts, tmp_path):
    before = load_model(VQVAEModel, str(parts / "tokenizer"))
    train_decoder(make_recipe())
    after = load_model(VQVAEModel, str(tmp_path / "run" / "model"))
    assert tokenizer_hash(after) == tokenizer_hash(before), "codes, and so caches and priors, stay valid"
    learned = {name for name, _ in before.decoder.named_parameters()}
    assert learned
    for name, value in before.state_dict().items():
        changed = not torch.equal(value, after.state_dict()[name])
        assert changed == (name.removeprefix("decoder.") in learned and name.startswith("decoder.")), name


def test_a_whole_model_stays_whole(make_recipe, parts, tmp_path):
    train_decoder(make_recipe(f"model={parts / 'whole'}"))
    before, after = (load_model(IsicVQModel, str(p)) for p in (parts / "whole", tmp_path / "run" / "model"))
    for name, value in before.prior.state_dict().items():
        assert torch.equal(value, after.prior.state_dict()[name]), name
    codes = before.generate(2, seed=0).codes
    assert torch.equal(after.generate(2, seed=0).codes, codes)
    assert not torch.equal(before.decode(codes), after.decode(codes))


def test_the_discriminator_counts_once_it_has_learned_alone(make_recipe, tmp_path):
    train_decoder(make_recipe())
    steps = records(tmp_path / "run", "batch")
    assert ["adversarial_loss" in step for step in steps] == [False, False, True, True, True, True]
    assert all("discriminator_loss" in step for step in steps)


def test_a_run_has_its_figures(make_recipe, tmp_path):
    train_decoder(make_recipe())
    names = {path.name for path in write_figures(tmp_path / "run") if path.suffix == ".png"}
    assert names == {"decoder_batch_loss.png", "decoder_epoch_loss.png", "decoder_reconstructions.png"}


def test_what_validation_measures_of_the_loss_has_the_names_of_training(make_recipe, tmp_path):
    train_decoder(make_recipe())
    write_figures(tmp_path / "run")
    with (tmp_path / "run" / "figures" / "decoder_epoch_loss.csv").open(newline="") as file:
        *_, last = csv.DictReader(file)
    shared = {"loss", "l1_loss", "mse_loss", "feature_loss"}
    for split in ("validation", "averaged"):
        found = {name.partition("/")[2]: float(last[name]) for name in last if name.startswith(split)}
        assert set(found) == shared
        weighted = found["l1_loss"] + 5 * found["mse_loss"] + 0.1 * found["feature_loss"]
        assert found["loss"] == pytest.approx(weighted, rel=1e-12)
    assert {f"train/{name}" for name in shared} < set(last)


def test_the_report_counts_the_images_that_were_measured(make_recipe, tiny_run, tmp_path):
    damaged = shutil.copytree(tiny_run.images["validation"], tmp_path / "damaged")
    (damaged / "003.png").write_text("this is no image")
    report = train_decoder(make_recipe(f"data.validation=folder:{damaged}", "data.max_corrupt_share=0.1"))
    assert {metric.n for metric in report.metrics} == {15}, "one of sixteen is corrupt"


def test_terms_of_weight_zero_are_left_out(make_recipe, tmp_path):
    train_decoder(make_recipe("adversarial_weight=0", "feature_weight=0"))
    (first, *_) = records(tmp_path / "run", "batch")
    assert not {"feature_loss", "discriminator_loss", "adversarial_loss"} & set(first)
    assert first["loss"] == pytest.approx(first["l1_loss"] + 5 * first["mse_loss"], rel=1e-5)


def test_the_ssim_term_is_added_with_its_weight_and_raises_ssim(make_recipe, tmp_path):
    only = ["adversarial_weight=0", "feature_weight=0", "l1_weight=0", "mse_weight=0.01", "ssim_weight=2"]
    report = train_decoder(make_recipe(*only, "loop.max_steps=40", "loop.learning_rate=1e-2"))
    (first, *_) = records(tmp_path / "run", "batch")
    assert first["loss"] == pytest.approx(0.01 * first["mse_loss"] + 2 * first["ssim_loss"], rel=1e-5)
    assert report.value("ssim") > report.value("ssim_before")


def test_feature_matching_lowers_the_feature_distance(make_recipe, tmp_path):
    report = train_decoder(
        make_recipe(
            "adversarial_weight=0", "feature_weight=5", "loop.max_steps=40", "loop.learning_rate=1e-2"
        )
    )
    assert report.value("feature_distance") < report.value("feature_distance_before")
    assert Report.load(tmp_path / "run" / "report.json").value("psnr") == report.value("psnr")


def test_the_report_starts_from_the_model_as_it_was(make_recipe, tmp_path):
    lengths = {steps: f"output_dir={tmp_path / str(steps)}" for steps in (2, 4)}
    short, long = (
        train_decoder(make_recipe(f"loop.max_steps={steps}", folder)) for steps, folder in lengths.items()
    )
    for name in ("psnr", "ssim", "feature_distance", "frechet_distance"):
        assert short.value(name + "_before") == long.value(name + "_before"), name


@pytest.mark.parametrize("step", [1, 3])
def test_stop_and_resume_is_the_uninterrupted_run(make_recipe, tmp_path, monkeypatch, step):
    """The discriminator is part of the state: before it counts, and after."""
    import isic_vq.training.decoder as stage

    train_decoder(make_recipe())
    reference = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patch:
        from line_task import interrupt_at

        stop = interrupt_at(step)
        patch.setattr(stage.DecoderTask, "before_step", lambda self, now: stop(now))
        with pytest.raises(InterruptedTraining, match=f"stopped at step {step + 1}"):
            train_decoder(make_recipe())
    before = json.loads((tmp_path / "run" / "run.json").read_text())["identifier"]
    train_decoder(make_recipe(), resume=True)
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == reference
    assert json.loads((tmp_path / "run" / "run.json").read_text())["identifier"] == before


@pytest.mark.parametrize("key", ["model", "feature_model"])
def test_recipe_without_its_models_names_the_key(make_recipe, key):
    with pytest.raises(DataError, match=f"^{key} is not set"):
        train_decoder(make_recipe(f"{key}=''"))


def test_folder_that_is_no_feature_model_is_refused(make_recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="feature_model cannot be read"):
        train_decoder(make_recipe(f"feature_model={tmp_path / 'empty'}"))


def test_recipe_without_a_reconstruction_term_is_refused():
    with pytest.raises(ValueError, match="must stay close to its images"):
        load_recipe(DecoderRecipe, None, ["l1_weight=0", "mse_weight=0"])
