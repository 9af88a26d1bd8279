"""The prior stage: codes of the right tokenizer, labels in their fixed order, and a model that generates."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from isic_vq.data.code_cache import CodeCache, read_code_cache, write_code_cache
from isic_vq.data.schema import DataError
from isic_vq.data.sources import SourceInfo, describe_source
from isic_vq.evaluation.code_noise import annealed_share, disturb_context
from isic_vq.evaluation.distances import frechet_distance
from isic_vq.evaluation.features import FeatureModel
from isic_vq.evaluation.report import Report
from isic_vq.hub.pretrained import ModelError, load_model
from isic_vq.models.configuration_pixelcnn import PixelCNNConfig
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.diagnosis import DIAGNOSES
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_pixelcnn import PixelCNNModel
from isic_vq.models.modeling_prior import PriorOutput
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.training.load import load_recipe
from isic_vq.training.prior import (
    CodeGrids,
    PriorTask,
    SampleQuality,
    fit_clusters,
    known_to_training,
    open_task,
    train_prior,
)
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import LoopRecipe, PriorRecipe, RecipeError


def cache_of(diagnoses, views=8, num_codes=8):
    """Codes that name their image and view: image i, view v is filled with (i + v) mod K."""
    shape = (len(diagnoses), views, 4, 4)
    image, view = np.arange(len(diagnoses))[:, None, None, None], np.arange(views)[None, :, None, None]
    codes = np.broadcast_to((image + view) % num_codes, shape).astype(np.uint16)
    ids = [f"image {index}" for index in range(len(diagnoses))]
    return CodeCache(codes, ids, diagnoses, num_codes, "hash", describe_source("synthetic:1"))


@pytest.fixture
def make_recipe(tiny_run, tmp_path):
    def make(*overrides):
        overrides = [f"output_dir={tmp_path / 'run'}", *overrides]
        return load_recipe(PriorRecipe, tiny_run.configs["prior"], overrides)

    return make


@pytest.fixture
def make_task(tmp_path):
    """Tasks on codes that name their image and view, ready for their first epoch."""

    def make(views=8, seed=0, **config):
        torch.manual_seed(0)
        fields = {"num_codes": 8, "grid_size": 4, "hidden_size": 8, "num_layers": 1, "head_size": 8}
        fields |= {"first_kernel_size": 3, "id2label": {0: "melanoma"}}
        config = PixelCNNConfig(**{**fields, **config})
        tokenizer = VQVAEConfig(image_size=16, hidden_sizes=[4, 8], num_codes=config.num_codes, code_dim=4)
        grids = CodeGrids(cache_of(["melanoma"] * 8, views), ["melanoma"])
        recipe = PriorRecipe(loop=LoopRecipe(seed=seed, precision="fp32"))
        task = PriorTask(PixelCNNModel(config), VQVAEModel(tokenizer), grids, grids, recipe)
        task.begin(Processes(recipe.loop, tmp_path))
        task.before_epoch(0)
        return task

    return make


# What it refuses


@pytest.mark.parametrize("part", ["train_codes", "validation_codes"])
def test_codes_of_another_tokenizer_are_refused(tiny_run, make_recipe, tmp_path, part):
    cache = read_code_cache(tiny_run.codes["train"])
    other = CodeCache(**{**vars(cache), "tokenizer_hash": "of another one"})
    write_code_cache(other, tmp_path / "other.parquet")
    with pytest.raises(DataError, match=f"{part} was encoded by another tokenizer: encode the images again"):
        train_prior(make_recipe(f"{part}={tmp_path / 'other.parquet'}"))
    assert not (tmp_path / "run").exists(), "a run that cannot begin leaves no folder"


def test_another_tokenizer_refuses_the_codes(make_recipe, tiny_run, tmp_path):
    model = load_model(VQVAEModel, str(tiny_run.vqvae / "model"))
    with torch.no_grad():
        model.quantizer.codebook[0] += 1e-3
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(DataError, match="train_codes was encoded by another tokenizer"):
        train_prior(make_recipe(f"tokenizer={tmp_path / 'other'}"))


@pytest.mark.parametrize("key", ["tokenizer", "train_codes", "validation_codes"])
def test_recipe_without_its_inputs_names_the_key(make_recipe, key):
    with pytest.raises(DataError, match=f"{key} is not set: name it in the recipe or as {key}=PATH"):
        train_prior(make_recipe(f"{key}=''"))


def test_folder_that_is_no_tokenizer_is_refused_by_name(tiny_run, make_recipe):
    with pytest.raises(ModelError, match="best is a PixelCNN prior: expected a tokenizer"):
        train_prior(make_recipe(f"tokenizer={tiny_run.prior / 'best'}"))


def test_damaged_tokenizer_is_refused_by_name(tiny_run, make_recipe, tmp_path):
    load_model(VQVAEModel, str(tiny_run.vqvae / "model")).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cut cannot be read as a tokenizer"):
        train_prior(make_recipe(f"tokenizer={tmp_path / 'cut'}"))


# Labels and views


def test_label_ids_follow_the_fixed_order_of_the_diagnoses():
    cache = cache_of(["vascular_lesion", "melanoma", "unknown", "nevus", "melanoma"])
    assert cache.class_names() == ["melanoma", "nevus", "vascular_lesion"], (
        "the order of DIAGNOSES, not of the data"
    )
    assert CodeGrids(cache, cache.class_names()).labels.tolist() == [2, 0, 3, 1, 0], (
        "unknown is unconditional"
    )


def test_diagnosis_that_training_never_saw_is_unconditional():
    grids = CodeGrids(cache_of(["nevus", "dermatofibroma"]), ["melanoma", "nevus"])
    assert grids.labels.tolist() == [1, 2]


def test_trained_prior_knows_its_classes_by_name_and_id(tiny_run):
    config = load_model(IsicVQModel, str(tiny_run.prior / "model")).config.prior_config
    assert config.id2label == dict(enumerate(DIAGNOSES[:8]))
    assert config.label2id == {name: index for index, name in config.id2label.items()}


def views_shown(task, epoch, indices=range(8), step=0):
    """The view of each image that the loss is computed on in an epoch."""
    shown = []

    def model(codes, labels, context, targets):
        shown.append(codes[:, 0, 0])
        return PriorOutput(loss=codes.float().mean())

    task.before_epoch(epoch)
    task.losses(model, task.collate([task.train_set[index] for index in indices]), step)
    return ((shown[0] - torch.tensor(list(indices))) % 8).tolist()


def test_view_of_an_image_depends_on_seed_epoch_and_index_alone(make_task):
    task = make_task()
    first = views_shown(task, epoch=5)
    torch.manual_seed(2)
    for part in ([6], [3, 1, 2], [7, 6, 5, 4, 3, 2, 1, 0]):
        assert views_shown(task, 5, part, step=9) == [first[index] for index in part], (
            "whatever the batch, its order and the step"
        )
    assert views_shown(task, epoch=6) != first
    assert views_shown(make_task(seed=1), epoch=5) != first


@pytest.mark.parametrize("views", [1, 4, 8])
def test_every_view_has_its_turn_and_none_is_invented(make_task, views):
    task = make_task(views=views)
    assert {view for epoch in range(20) for view in views_shown(task, epoch)} == set(range(views))


def test_validation_measures_the_first_view_in_eval_mode(make_task):
    task = make_task(dropout=0.5, class_dropout=0.5)
    with torch.no_grad():
        logits = task.model.eval()(
            task.validation_set.codes[:, 0], task.validation_set.labels
        ).logits.double()
    target = task.validation_set.codes[:, :1]
    nats = -logits.log_softmax(1).gather(1, target).mean().item()
    task.model.train()
    found = task.validate()
    assert found["loss"] == pytest.approx(nats, rel=1e-5)
    assert found["bits_per_code"] == pytest.approx(nats / math.log(2), rel=1e-5)


# Loss


def test_loss_of_an_untrained_prior_is_near_log_k(make_task):
    task = make_task(num_codes=64, hidden_size=16)
    task.train_set.codes = torch.randint(64, task.train_set.codes.shape)
    batch = task.collate([task.train_set[index] for index in range(8)])
    loss = task.losses(task.model, batch, step=0)["loss"].item()
    assert loss == pytest.approx(math.log(64), rel=0.1), (
        "it knows nothing yet, and must not be sure of anything"
    )


def test_two_steps_lower_the_loss_on_one_batch(make_task):
    task = make_task(dropout=0.0, class_dropout=0.0)
    batch = task.collate([task.train_set[index] for index in range(8)])
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-2)
    history = []
    for _ in range(3):
        loss = task.losses(task.model, batch, step=0)["loss"]
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert history[2] < history[0], history


# Context noise


def inputs_seen(task, step, indices=range(8)):
    """What the prior of a task is given and compared with at a step, in the order of the indices."""
    seen = []

    def model(codes, labels, context, targets):
        seen.extend([codes, targets])
        return PriorOutput(loss=codes.float().mean())

    task.losses(model, task.collate([task.train_set[index] for index in indices]), step)
    return seen


def test_context_noise_disturbs_inputs_by_seed_step_and_image_and_leaves_targets(make_task):
    task = make_task(views=1)
    task.recipe.context_noise = 1.0
    inputs, targets = inputs_seen(task, step=3)
    assert torch.equal(targets, task.train_set.codes[:, 0]), "clean"
    assert not torch.equal(inputs, targets)
    torch.manual_seed(7)
    for part in ([6], [3, 1, 2], [7, 6, 5, 4, 3, 2, 1, 0]):
        assert torch.equal(inputs_seen(task, 3, part)[0], inputs[list(part)]), "whatever the batch"
    assert not torch.equal(inputs_seen(task, step=4)[0], inputs)
    other = make_task(views=1, seed=1)
    other.recipe.context_noise = 1.0
    assert not torch.equal(inputs_seen(other, step=3)[0], inputs)
    last = task.recipe.loop.max_steps
    assert torch.equal(inputs_seen(task, step=math.ceil(0.75 * last))[0], targets), "none in the last quarter"
    task.recipe.context_noise = 0.0
    assert torch.equal(inputs_seen(task, step=3)[0], targets)


def test_context_noise_replaces_the_share_it_says_by_uniform_codes():
    codes, num_codes, share = torch.zeros(2000, 16, dtype=torch.long), 4, 0.6
    noisy = disturb_context(codes, num_codes, share, seed=0, step=0, indices=range(2000))
    moved = (noisy != 0).double().mean(1)  # a quarter of the replacements is the code itself
    assert moved.mean().item() == pytest.approx(share / 2 * 3 / 4, abs=0.01), "the mean of U(0, r)"
    # Var of a binomial's share with P ~ (3/4) U(0, r): E[P(1-P)] / n + Var P.
    mean, square = 0.75 * share / 2, (0.75 * share) ** 2 / 3
    assert moved.var().item() == pytest.approx((mean - square) / 16 + square - mean**2, rel=0.1)
    counts = torch.bincount(noisy[noisy != 0], minlength=num_codes)[1:].double()
    assert (counts / counts.sum() - 1 / 3).abs().max() < 0.02
    assert torch.equal(disturb_context(codes, num_codes, 0.0, 0, 0, range(2000)), codes)


def test_context_noise_falls_in_a_line():
    shares = [annealed_share(0.4, 0.75, progress) for progress in (0, 0.375, 0.75, 0.9)]
    assert shares == pytest.approx([0.4, 0.2, 0, 0])
    assert annealed_share(0.4, 0, 0) == 0


# Clusters


def test_clusters_are_those_of_the_mean_code_vectors_and_count_by_class():
    codebook = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    means = torch.tensor([0, 0, 1, 1, 1, 2])  # of each image, its codes and its class
    codes = means[:, None, None, None].expand(6, 2, 4, 4).contiguous()
    codes[0, 0, 0, 0] = 1  # a little off
    labels = torch.tensor([0, 0, 0, 1, 2, 1])  # 2 is no class
    config = PixelCNNConfig(num_codes=3, grid_size=4, hidden_size=4, num_layers=1, num_clusters=3)
    config.id2label = {0: "melanoma", 1: "nevus"}
    prior = PixelCNNModel(config)
    fit_clusters(prior, codebook, codes, labels, seed=0)
    clusters = prior.clusters_of(codes[:, 0])
    assert len(clusters.unique()) == 3
    assert all(len(clusters[means == mean].unique()) == 1 for mean in range(3)), "those that are alike"
    zero, one, two = (clusters[means == mean][0].item() for mean in range(3))
    # Twelve views; n(y, c) + 8 n(c) / N in whole numbers, and 1.
    weights = prior.cluster_weights
    assert weights[0, [zero, one, two]].tolist() == [4 * 12 + 16 * 4 + 1, 2 * 12 + 16 * 6 + 1, 16 * 2 + 1]
    assert weights[1, [zero, one, two]].tolist() == [16 * 4 + 1, 2 * 12 + 16 * 6 + 1, 2 * 12 + 16 * 2 + 1]
    assert weights[2, [zero, one, two]].tolist() == [28 * 4 + 1, 28 * 6 + 1, 28 * 2 + 1], "given none, of all"


def test_a_run_trains_a_prior_with_clusters_that_generates_and_scores(make_recipe, tmp_path):
    overrides = ["model.num_clusters=3", "context_noise=0.3", "loop.max_steps=2", "num_samples=2"]
    report = train_prior(make_recipe(*overrides))
    model = load_model(IsicVQModel, str(tmp_path / "run" / "model"))
    assert model.prior.cluster_scores.abs().sum() > 0
    assert model.generate(3, seed=0).clusters.shape == (3,)
    assert math.isfinite(report.value("bits_per_code"))


def test_more_clusters_than_images_are_refused_before_the_run_begins(make_recipe, tmp_path):
    with pytest.raises(
        RecipeError, match=r"model.num_clusters is 9999: expected at most the \d+ training images"
    ):
        train_prior(make_recipe("model.num_clusters=9999"))
    assert not (tmp_path / "run").exists()


# Selection and fine-tuning


@pytest.mark.parametrize(
    ("select_by", "sign"), [("frechet_distance", 1), ("recall", -1), ("bits_per_code", 1)]
)
def test_the_best_validation_is_that_of_the_chosen_measure(make_recipe, parts, tmp_path, select_by, sign):
    overrides = [f"feature_model={parts / 'features'}", f"select_by={select_by}", "select_samples=12"]
    train_prior(make_recipe(*overrides, "loop.learning_rate=0.02", "loop.max_steps=12"))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    epochs = [record for record in map(json.loads, lines) if record["kind"] == "epoch"]
    found = {
        (record["step"], kind): sign * record[f"{kind}/{select_by}"]
        for record in epochs
        for kind in ("validation", "averaged")
        if f"{kind}/{select_by}" in record
    }
    assert len(found) >= 4, "premise: there is a choice"
    progress = json.loads(max((tmp_path / "run" / "checkpoints").glob("step-*/progress.json")).read_text())
    assert progress["best_loss"] == pytest.approx(min(found.values()), abs=1e-9)
    assert progress["best_step"] in {
        step for (step, _), value in found.items() if value == min(found.values())
    }


def test_sample_quality_is_that_of_samples_beside_decoded_codes(tiny_run, parts):
    model = load_model(IsicVQModel, str(tiny_run.prior / "model"))
    codes = torch.from_numpy(read_code_cache(tiny_run.codes["validation"]).codes[:12, 0].astype("int64"))
    labels = torch.arange(12) % 3
    features = FeatureModel.from_pretrained(str(parts / "features"))
    measured = SampleQuality(features, codes, labels, seed=3).measure(model)

    def seen(images):
        return features((images * 255).round() / 255)

    with torch.no_grad():
        real, made = seen(model.decode(codes)), seen(model.generate(12, labels, seed=3).pixel_values)
    assert measured["frechet_distance"] == pytest.approx(frechet_distance(real, made), rel=1e-3, abs=1e-6)
    between, within = torch.cdist(real, made), torch.cdist(made, made).sort(1).values[:, 5]
    assert measured["recall"] == pytest.approx((between <= within).any(1).double().mean().item(), abs=1 / 11)


def test_a_run_goes_on_from_a_trained_prior_and_may_add_clusters(make_recipe, tiny_run, tmp_path):
    start = tiny_run.prior / "model"
    trained = load_model(IsicVQModel, str(start))
    task = open_task(make_recipe(f"start={start}", "model.num_clusters=2"))
    codes = task.validation_set.codes[:, 0]
    with torch.no_grad():
        for clusters in (torch.zeros(len(codes), dtype=torch.long), torch.ones(len(codes), dtype=torch.long)):
            found = task.model.eval()(codes, task.validation_set.labels, clusters=clusters).logits
            torch.testing.assert_close(found, trained.prior(codes, task.validation_set.labels).logits)
    assert task.model.cluster_scores.abs().sum() > 0, "found anew"
    assert task.fine_tunes
    train_prior(make_recipe(f"start={start}", "model.num_clusters=2", "loop.max_steps=2"))
    data = json.loads((tmp_path / "run" / "model" / "training_data.json").read_text())
    assert data["prior_start"] == data["prior"], "here the same images"
    again = open_task(
        make_recipe(f"start={tmp_path / 'run' / 'model'}", "model.num_clusters=2", "loop.seed=5")
    )
    assert torch.equal(again.model.cluster_scores, task.model.cluster_scores), (
        "those that it was trained with"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=4", r"start has hidden_size \d+, and this run 4: expected the same"),
        ("select_by=fid", "select_by is 'fid': expected 'bits_per_code', 'frechet_distance' or 'recall'"),
        ("select_by=recall", "select_by is 'recall': expected a feature_model"),
        ("select_samples=3", "select_samples is 3: expected at least 12"),
    ],
)
def test_starts_and_selections_that_do_not_fit_are_refused(
    make_recipe, tiny_run, tmp_path, override, message
):
    with pytest.raises(RecipeError, match=message):
        train_prior(make_recipe(f"start={tiny_run.prior / 'model'}", override))
    assert not (tmp_path / "run").exists()


# Pictures


def test_pictures_are_samples_of_the_prior_as_it_is(make_task):
    task = make_task()
    state = torch.get_rng_state()
    first = np.asarray(task.pictures()["samples"])
    assert first.shape == (4 * 18 + 2, 4 * 18 + 2, 3), "4 x 4 images of 16 pixels, 2 between them"
    assert np.array_equal(np.asarray(task.pictures()["samples"]), first), "the same noise every time"
    assert torch.equal(torch.get_rng_state(), state), "training would go on elsewhere"
    with torch.no_grad():
        for parameter in task.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert not np.array_equal(np.asarray(task.pictures()["samples"]), first)


# What a run leaves behind


def test_model_folder_generates_the_samples_of_the_run(tiny_run):
    model = load_model(IsicVQModel, str(tiny_run.prior / "model"))
    arrays = load_file(tiny_run.prior / "arrays" / "samples.safetensors")
    assert (arrays["images"].shape, arrays["images"].dtype) == ((10, 16, 16, 3), torch.uint8)
    assert arrays["labels"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0], (
        "each class in turn, then unconditional"
    )
    pixel_values = model.generate(10, arrays["labels"], seed=0).pixel_values
    expected = IsicVQImageProcessor(size=16).postprocess(pixel_values, output_type="np")
    assert np.array_equal(arrays["images"], expected), "what was saved is what the figures show"


def test_model_folder_holds_the_tokenizer_bit_for_bit(tiny_run):
    whole = load_model(IsicVQModel, str(tiny_run.prior / "model"))
    tokenizer = load_model(VQVAEModel, str(tiny_run.vqvae / "model"))
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(whole.vqvae.state_dict()[name], value), name


def test_report_lines_are_consistent(tiny_run):
    report = Report.load(tiny_run.prior / "report.json")
    bits = report.value("bits_per_code")
    assert report.value("bits_per_code_flat") == 3.0, "log2 of 8 codes"
    assert report.value("bits_per_pixel") == pytest.approx(bits / 16), "one code covers 4 x 4 pixels"
    train, validation = (read_code_cache(tiny_run.codes[part]) for part in ("train", "validation"))
    counts = np.bincount(train.codes.ravel(), minlength=8) + 1
    unigram = -np.log2(counts / counts.sum())[validation.codes[:, 0].ravel()].mean()
    assert report.value("bits_per_code_unigram") == pytest.approx(unigram, rel=1e-9)
    assert {metric.n for metric in report.metrics} == {16}
    assert report.tables["sample_labels"] == [*DIAGNOSES[:8], "unconditional", "melanoma"]


def test_reported_bits_are_those_of_the_best_validation(tiny_run):
    lines = [json.loads(line) for line in (tiny_run.prior / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    best = min(min(line["validation/bits_per_code"], line["averaged/bits_per_code"]) for line in epochs)
    assert Report.load(tiny_run.prior / "report.json").value("bits_per_code") == pytest.approx(best, rel=1e-6)


def test_unknown_type_of_prior_is_refused(make_recipe):
    with pytest.raises(
        RecipeError, match=r"prior model_type is 'gpt': expected one of \['isic_pixelcnn', 'isic_var'\]"
    ):
        train_prior(make_recipe("model={model_type: gpt}"))


def test_keys_of_another_type_of_prior_are_refused(make_recipe):
    with pytest.raises(RecipeError, match="unknown recipe key model.num_heads"):
        train_prior(make_recipe("model.num_heads=2"))


def _cache(path, names, classes=("a", "b", "c")):
    info = SourceInfo("folder:x", "0" * 64, len(names), {}, [], dict(Counter(names)), classes=list(classes))
    codes = np.zeros((len(names), 1, 4, 4), np.uint16)
    return CodeCache(codes, [f"{path}{i}" for i in range(len(names))], list(names), 8, "h", info)


def test_a_class_of_validation_alone_stops_or_is_left_out_and_counted(caplog):
    caplog.set_level("INFO", "isic_vq")
    train, validation = _cache("t", "aab"), _cache("v", ["a", "c", "c", "unknown"])
    assert train.class_names() == ["a", "b"]
    with pytest.raises(
        DataError, match=r"no training image has: 'c' \(2 images\)\. Add .* drop_other_classes=true"
    ):
        known_to_training(validation, train.class_names(), False)
    kept = known_to_training(validation, train.class_names(), True)
    assert (kept.isic_ids, kept.diagnoses, kept.source.num_images) == (["v0", "v3"], ["a", "unknown"], 2)
    assert "left out, validation images of classes that no training image has: 'c' (2 images)" in caplog.text
    assert known_to_training(train, train.class_names(), False) is train
