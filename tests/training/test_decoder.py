"""The fine-tuning stage: what it trains, what it leaves alone, and what it reports."""

import csv
import json
import shutil

import pytest
import torch
from run_folder import records
from transformers import ResNetConfig, ResNetForImageClassification

from isic_vq.data.code_cache import tokenizer_hash
from isic_vq.data.schema import DataError
from isic_vq.evaluation.code_noise import disturb_codes
from isic_vq.evaluation.report import Report
from isic_vq.figures import write_figures
from isic_vq.hub.pretrained import ModelError, load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.training.decoder import train_decoder
from isic_vq.training.load import load_recipe
from isic_vq.training.loop import InterruptedTraining
from isic_vq.training.recipe import DecoderRecipe, RecipeError


@pytest.fixture
def make_recipe(decoder_settings, tmp_path):
    def make(*overrides):
        settings = [f"output_dir={tmp_path / 'run'}", *decoder_settings, *overrides]
        return load_recipe(DecoderRecipe, None, settings)

    return make


@pytest.fixture(scope="module")
def classifier(parts, tmp_path_factory):
    """A classifier of two diagnoses."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(1)
    labels = {0: "nevus", 1: "melanoma"}
    config = ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic", id2label=labels
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    shutil.copy(parts / "features" / "preprocessor_config.json", folder)
    return folder


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


def test_the_warm_up_leaves_the_decoder_as_it_is(make_recipe, parts, tmp_path):
    train_decoder(make_recipe("discriminator_warmup=6", "adversarial_start=6"))
    before, after = (
        load_model(VQVAEModel, str(p)) for p in (parts / "tokenizer", tmp_path / "run" / "model")
    )
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    first, *_, last = records(tmp_path / "run", "batch")
    assert last["discriminator_loss"] != first["discriminator_loss"]
    assert last["loss"] == last["discriminator_loss"]


def test_the_loss_is_the_weighted_sum_of_its_terms(make_recipe, tmp_path):
    train_decoder(
        make_recipe(
            "adversarial_weight=0.3",
            "lecam_weight=0.5",
            "ssim_weight=0.2",
            "grid_weight=0.4",
            "spectrum_weight=0.6",
        )
    )
    last = records(tmp_path / "run", "batch")[-1]
    weights = {
        "l1": 1,
        "mse": 5,
        "ssim": 0.2,
        "grid": 0.4,
        "spectrum": 0.6,
        "feature": 0.1,
        "discriminator": 1,
        "lecam": 0.5,
        "adversarial": 0.3,
    }
    assert last["loss"] == pytest.approx(
        sum(w * last[f"{name}_loss"] for name, w in weights.items()), rel=1e-5
    )


def test_matching_logits_lowers_their_distance(make_recipe, classifier, tmp_path):
    only = ["adversarial_weight=0", "feature_weight=0", "l1_weight=0", "mse_weight=0.01", "logit_weight=5"]
    length = ["loop.max_steps=40", "loop.learning_rate=1e-2"]
    train_decoder(make_recipe(*only, *length, f"feature_model={classifier}"))
    steps = records(tmp_path / "run", "batch")
    assert steps[0]["loss"] == pytest.approx(
        0.01 * steps[0]["mse_loss"] + 5 * steps[0]["logit_loss"], rel=1e-5
    )
    assert sum(s["logit_loss"] for s in steps[-8:]) < 0.5 * sum(s["logit_loss"] for s in steps[:8])


def test_logits_of_features_without_a_head_are_refused(make_recipe):
    with pytest.raises(ModelError, match="no image classifier whose labels name diagnoses"):
        train_decoder(make_recipe("logit_weight=1"))


def test_a_refinement_is_added_and_starts_as_identity(make_recipe, parts, tmp_path):
    whole = f"model={parts / 'whole'}"
    still = ["refinement_size=4", "discriminator_warmup=6", "adversarial_start=6"]
    train_decoder(make_recipe(whole, *still))
    before, after = (load_model(IsicVQModel, str(p)) for p in (parts / "whole", tmp_path / "run" / "model"))
    assert after.config.vqvae_config.refinement_size == 4
    codes = before.generate(2, seed=0).codes
    assert torch.equal(after.generate(2, seed=0).codes, codes)
    assert torch.equal(after.decode(codes), before.decode(codes))
    assert tokenizer_hash(after.vqvae) == tokenizer_hash(before.vqvae)
    again = [f"model={tmp_path / 'run' / 'model'}", f"output_dir={tmp_path / 'again'}"]
    train_decoder(make_recipe(*again))
    learned = load_model(VQVAEModel, str(tmp_path / "again" / "model")).decoder.refinement
    assert learned.last.weight.abs().max() > 0
    with pytest.raises(ModelError, match="refinement_size is 8: the model's is 4"):
        train_decoder(make_recipe(*again, f"output_dir={tmp_path / 'other'}", "refinement_size=8"))


@pytest.mark.parametrize(("annealed", "shares"), [(False, [0.5] * 4), (True, [0.5, 0.375, 0.25, 0.125])])
def test_code_noise_is_what_the_recipe_says(make_recipe, monkeypatch, annealed, shares):
    import isic_vq.training.decoder as stage

    asked = []

    def noted(codes, codebook, *settings):
        asked.append(settings[:3])
        return disturb_codes(codes, codebook, *settings)

    monkeypatch.setattr(stage, "disturb_codes", noted)
    noise = "code_noise={image_share: 0.7, code_share: 0.5, num_nearest: 3, annealed: " + str(annealed) + "}"
    train_decoder(make_recipe("loop.max_steps=4", noise))
    assert asked == [(0.7, share, 3) for share in shares]


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
    assert report.value("ssim") > report.value("ssim", state="before")


def test_feature_matching_lowers_the_feature_distance(make_recipe, tmp_path):
    report = train_decoder(
        make_recipe(
            "adversarial_weight=0", "feature_weight=5", "loop.max_steps=40", "loop.learning_rate=1e-2"
        )
    )
    assert report.value("feature_distance") < report.value("feature_distance", state="before")
    assert Report.load(tmp_path / "run" / "report.json").value("psnr") == report.value("psnr")
    before = report.value("texture", images="reconstructions", state="before")
    assert report.value("texture", images="reconstructions") != before > 0
    assert report.value("grid_power_mean", images="reconstructions", period="4 px") > 0


def test_the_report_starts_from_the_model_as_it_was(make_recipe, tmp_path):
    lengths = {steps: f"output_dir={tmp_path / str(steps)}" for steps in (2, 4)}
    short, long = (
        train_decoder(make_recipe(f"loop.max_steps={steps}", folder)) for steps, folder in lengths.items()
    )
    for name in ("psnr", "ssim", "feature_distance", "frechet_distance"):
        assert short.value(name, state="before") == long.value(name, state="before"), name


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_stop_and_resume_is_the_uninterrupted_run(make_recipe, tmp_path, monkeypatch, step):
    """The discriminator is part of the state: before it counts, and after."""
    import isic_vq.training.decoder as stage

    everything = [
        "code_noise={image_share: 0.5, num_nearest: 3}",
        "lecam_weight=0.1",
        "discriminator_warmup=1",
        "refinement_size=4",
    ]
    train_decoder(make_recipe(*everything))
    reference = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run")
    with monkeypatch.context() as patch:
        from line_task import interrupt_at

        stop = interrupt_at(step)
        patch.setattr(stage.DecoderTask, "before_step", lambda self, now: stop(now))
        with pytest.raises(InterruptedTraining, match=f"stopped at step {step + 1}"):
            train_decoder(make_recipe(*everything))
    before = json.loads((tmp_path / "run" / "run.json").read_text())["identifier"]
    train_decoder(make_recipe(*everything), resume=True)
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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lecam_weight=-1"], "lecam_weight is -1: expected at least 0"),
        (["discriminator_layers=4"], "discriminator_layers is 4: expected 1, 2 or 3"),
        (["discriminator_warmup=200"], "discriminator_warmup is 200: expected at most adversarial_start"),
        (
            ["discriminator_warmup=5", "adversarial_weight=0"],
            "discriminator_warmup is 5: expected 0 without adversarial_weight",
        ),
        (["code_noise.image_share=1.5"], "image_share is 1.5: expected a value in"),
        (["code_noise.num_nearest=0"], "num_nearest is 0: expected at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(DecoderRecipe, None, overrides)


def test_more_near_codes_than_there_are_is_refused(make_recipe):
    with pytest.raises(RecipeError, match="num_nearest is 12: expected fewer than the tokenizer's 8 codes"):
        train_decoder(make_recipe("code_noise.image_share=0.5"))


def test_recipe_without_a_reconstruction_term_is_refused():
    with pytest.raises(ValueError, match="must stay close to its images"):
        load_recipe(DecoderRecipe, None, ["l1_weight=0", "mse_weight=0"])
