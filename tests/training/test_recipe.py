"""Recipes: YAML plus overrides, every key and type checked by name, and nothing private in what is saved."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from transformers import ResNetConfig
from transformers.configuration_utils import PreTrainedConfig

from generalization_recipe import GeneralizationRecipe
from granularity_recipe import GranularityRecipe
from isic_vq.data.classes import Classes
from isic_vq.models.configuration_pixelcnn import PixelCNNConfig
from isic_vq.models.configuration_var import VARConfig
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.training.load import build_recipe, known_keys, load_recipe
from isic_vq.training.prior import build_prior_config
from isic_vq.training.recipe import (
    ClassifierRecipe,
    DecoderRecipe,
    PriorRecipe,
    RecipeError,
    VQVAERecipe,
    public_recipe,
)
from isic_vq.training.run import build_config
from leave_one_out import LeaveOneOutRecipe

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples" / "configs").glob("*.yaml"))
# The recipe of each stage, and the config that its `model` section fills, if it builds a model of its own.
STAGES = {
    "vqvae": (VQVAERecipe, VQVAEConfig),
    "prior": (PriorRecipe, None),
    "decoder": (DecoderRecipe, None),
    "classifier": (ClassifierRecipe, ResNetConfig),
    "granularity": (GranularityRecipe, None),
    "generalization": (GeneralizationRecipe, None),
    "leave-one-out": (LeaveOneOutRecipe, None),
}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "stage: vqvae\noutput_dir: runs/mine\ndata:\n  train: synthetic:64:0\nloop:\n  learning_rate: 1e-3\n"
        "  trackers: [tensorboard]\nmodel:\n  preset: f8\n  code_dim: 16\n"
    )
    return path


def test_yaml_fills_the_recipe_and_leaves_the_rest_at_its_defaults(config):
    recipe = load_recipe(VQVAERecipe, config, [])
    assert (recipe.output_dir, recipe.data.train) == ("runs/mine", "synthetic:64:0")
    assert recipe.loop.trackers == ["tensorboard"]
    assert recipe.model == {"preset": "f8", "code_dim": 16}
    assert recipe.loop.max_steps == VQVAERecipe().loop.max_steps


def test_overrides_win_over_the_file_at_any_depth(config):
    overrides = [
        "output_dir=runs/other",
        "loop.max_steps=200",
        "model.hidden_sizes=[8, 16]",
        "data.cache=false",
    ]
    recipe = load_recipe(VQVAERecipe, config, overrides)
    assert (recipe.output_dir, recipe.loop.max_steps, recipe.data.cache) == ("runs/other", 200, False)
    assert recipe.model == {"preset": "f8", "code_dim": 16, "hidden_sizes": [8, 16]}
    assert recipe.data.train == "synthetic:64:0", "an override inside data must not drop its neighbours"


def test_overrides_alone_make_a_recipe():
    assert load_recipe(PriorRecipe, None, ["loop.seed=3"]).loop.seed == 3


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1.5e2", 150.0), (".5", 0.5), ("2", 2), ("+1e+1", 10.0)]
)
def test_scientific_notation_is_a_number_in_file_and_override(tmp_path, text, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"loop:\n  weight_decay: {text}\n")
    for recipe in (
        load_recipe(VQVAERecipe, path, []),
        load_recipe(VQVAERecipe, None, [f"loop.weight_decay={text}"]),
    ):
        assert recipe.loop.weight_decay == value
        assert type(recipe.loop.weight_decay) is type(value)


@pytest.mark.parametrize("text", ["folder:a-1e3", "2024-01-01x", "1e", "e3"])
def test_text_that_only_resembles_a_number_stays_text(text):
    assert load_recipe(VQVAERecipe, None, [f"output_dir={text}"]).output_dir == text


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("ouput_dir", "did you mean output_dir?"),
        ("loop.max_step", "did you mean loop.max_steps?"),
        ("data.trian", "did you mean data.train?"),
        ("zzz", "Known: output_dir, stage, data, loop"),
        ("loop.zzz", "Known: loop.max_steps, loop.batch_size"),
        ("1", "Known: output_dir"),
    ],
)
def test_unknown_key_is_named_with_what_was_meant(key, suggestion):
    with pytest.raises(RecipeError, match="unknown recipe key") as error:
        load_recipe(VQVAERecipe, None, [f"{key}=1"])
    assert f"unknown recipe key {key}" in str(error.value)
    assert suggestion in str(error.value)


@pytest.mark.parametrize("separator", [": did you mean", ". Known"])
def test_unknown_key_message_is_two_sentences(separator):
    key = "output_dri" if "mean" in separator else "zzz"
    with pytest.raises(RecipeError) as error:
        load_recipe(VQVAERecipe, None, [f"{key}=1"])
    assert f"{key}{separator}" in str(error.value)


@pytest.mark.parametrize(
    ("config_class", "key", "suggestion"),
    [
        (VQVAEConfig, "num_code", "did you mean model.num_codes?"),
        (PixelCNNConfig, "hidden_sise", "did you mean model.hidden_size?"),
        (VQVAEConfig, "zzz", "model.zzz. Known: model.beta, model.code_dim"),
        (VQVAEConfig, "torch_dtype", "unknown recipe key model.torch_dtype"),
    ],
)
def test_unknown_model_key_is_refused_where_transformers_would_store_it(config_class, key, suggestion):
    assert getattr(config_class(**{key: 1}), key) == 1, (
        "transformers alone takes any key: our check is needed"
    )
    with pytest.raises(RecipeError) as error:
        build_config(config_class, {key: 1})
    assert suggestion in str(error.value)


def test_preset_fills_in_what_the_recipe_leaves_open():
    config = build_config(VQVAEConfig, {"preset": "f4", "code_dim": 8})
    assert (list(config.hidden_sizes), config.code_dim, config.grid_size) == ([64, 128], 8, 32)
    assert list(build_config(VQVAEConfig, {"preset": "f4", "hidden_sizes": [4]}).hidden_sizes) == [4]


def test_unknown_preset_is_refused():
    with pytest.raises(RecipeError, match=r"model.preset is 'f16': expected one of \['f4', 'f8'\]"):
        build_config(VQVAEConfig, {"preset": "f16"})


def test_model_value_that_does_not_fit_is_a_recipe_error():
    with pytest.raises(RecipeError, match=r"model.image_size is 20: expected a positive multiple of 8"):
        build_config(VQVAEConfig, {"image_size": 20})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loop.max_steps=many", r"loop.max_steps: expected int, got str \('many'\)"),
        ("loop.max_steps=1.5", "loop.max_steps: expected int, got float"),
        ("loop.max_steps=0", "max_steps is 0: expected more than 0"),
        ("loop.batch_size=-4", "batch_size is -4: expected more than 0"),
        ("loop.average_decay=1", r"average_decay is 1: expected a value in \[0, 1\)"),
        ("loop.precision=fp8", "precision is 'fp8': expected 'auto', 'fp32' or 'bf16'"),
        ("loop.trackers=[mlflow]", r"trackers has \['mlflow'\]: expected any of wandb, tensorboard, trackio"),
        ("loop=3", "loop is 3: expected keys and values"),
        ("output_dir=[a]", "^output_dir: expected str, got list"),
        ("data.train.uri=x", "data.train: expected str, got dict"),
        ("codebook_warmup_steps=1000", "codebook_warmup_steps is 1000.*less than loop.max_steps"),
        ("codebook_warmup_steps=-1", "codebook_warmup_steps is -1: expected at least 0"),
        ("codebook_start=zeros", "codebook_start is 'zeros': expected 'kmeans' or 'random'"),
        ("loop.accumulation_steps=0", "accumulation_steps is 0: expected more than 0"),
        ("loop.process_timeout=0", "process_timeout is 0: expected more than 0"),
        ("loop.compile=often", "loop.compile: expected bool, got str"),
        ("loop.trackers=wandb", "loop.trackers: expected a list, got str"),
    ],
)
def test_value_of_the_wrong_type_or_range_names_its_field(override, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(VQVAERecipe, None, [override])
    text = " ".join(str(error.value).split())
    assert re.search(message, text), text


def test_a_prior_without_samples_is_refused_before_it_is_trained():
    with pytest.raises(RecipeError, match="num_samples is 0: expected at least 1"):
        load_recipe(PriorRecipe, None, ["num_samples=0"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_steps", "'max_steps' is not an override: expected key=value, such as loop.max_steps=200"),
        ("data.train=*.parquet", r"'data.train=\*.parquet' is not YAML after the =: put the value in quotes"),
        ("loop.trackers=[wandb", "is not YAML after the ="),
        ("output_dir.name=x", "'output_dir.name' reaches inside 'output_dir', which is a value"),
    ],
)
def test_override_that_cannot_be_read_is_quoted(config, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(VQVAERecipe, config, [override])


def test_recipe_of_the_other_stage_is_refused(config):
    with pytest.raises(RecipeError, match="this is a 'vqvae' recipe: expected a 'prior' one"):
        load_recipe(PriorRecipe, config, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a file: expected a YAML recipe, such as one of examples/configs"),
        ("- a\n- b\n", "holds a list: expected keys and values"),
        ("loop: [1\n", "is not YAML"),
        ("loop:\n  seed: 1\ndata: {}\nloop:\n  seed: 2\n", "is not YAML: it names 'loop' 2 times: write one"),
        ("data: {train: a, cache: no, train: b}\n", "is not YAML: it names 'train' 2 times: write one"),
    ],
)
def test_file_that_is_no_recipe_is_named(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=f"broken.yaml {message}"):
        load_recipe(VQVAERecipe, path, [])


def test_empty_file_is_a_recipe_of_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    assert load_recipe(VQVAERecipe, tmp_path / "empty.yaml", []) == VQVAERecipe()


@pytest.mark.parametrize(
    ("private", "public"),
    [
        ("/data/ham/train.parquet", "train.parquet"),
        ("folder:/data/ham/", "folder:ham"),
        ("parquet:/data/ham/train-*.parquet", "parquet:train-*.parquet"),
        ("folder:/data/a:b/images", "folder:images"),
        ("/data/a:b/images", "images"),
        ("~/images", "images"),
        ("C:\\data\\images", "images"),
        ("folder:C:\\data\\images", "folder:images"),
        ("parquet:${ISIC_VQ_DATA}/ham/*.parquet", "parquet:${ISIC_VQ_DATA}/ham/*.parquet"),
        ("runs/codes/train.parquet", "runs/codes/train.parquet"),
        ("synthetic:64:0", "synthetic:64:0"),
    ],
)
def test_published_recipe_hides_the_folders_of_a_machine(private, public):
    recipe = load_recipe(VQVAERecipe, None, [])
    recipe = dataclasses.replace(
        recipe, output_dir=private, data=dataclasses.replace(recipe.data, train=private), model={"x": private}
    )
    saved = public_recipe(recipe)
    assert (saved["output_dir"], saved["data"]["train"], saved["model"]["x"]) == (public, public, public)


def test_published_recipe_reads_back_equal(config, tmp_path):
    recipe = load_recipe(VQVAERecipe, config, ["loop.learning_rate=2e-5"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(public_recipe(recipe), sort_keys=False))
    assert load_recipe(VQVAERecipe, saved, []) == recipe


def test_every_example_recipe_loads_and_builds_its_model_config():
    for path in EXAMPLES:
        stage = yaml.safe_load(path.read_text())["stage"]
        recipe_class, config_class = STAGES[stage]
        recipe = load_recipe(recipe_class, path, [])  # errors name the file
        if stage == "prior":
            build_prior_config(VQVAEConfig(scales=[1, 2, 4, 8, 16]), recipe.model)
        elif config_class is not None:
            build_config(config_class, recipe.model)
        assert recipe.output_dir.startswith("runs/"), (
            f"{path.name}: examples write where .gitignore looks away"
        )


def test_there_are_examples_of_every_stage():
    assert {yaml.safe_load(path.read_text())["stage"] for path in EXAMPLES} == set(STAGES)


def test_all_mistakes_come_in_one_message_with_the_nearest_keys():
    overrides = [
        "image_size=64",
        "loop.max_steps=x",
        "data.trian=y",
        "loop.seed",
        "model.num_code=1",
        "loop.batch_size=0",
    ]
    with pytest.raises(RecipeError) as error:
        load_recipe(VQVAERecipe, None, overrides)
    text = str(error.value)
    assert text.startswith("6 mistakes in the recipe: ")
    for mistake in (
        "image_size: did you mean model.image_size?",
        "loop.max_steps: expected int, got str ('x')",
        "data.trian: did you mean data.train?",
        "'loop.seed' is not an override",
        "model.num_code: did you mean model.num_codes?",
        "loop.batch_size is 0: expected more than 0",
    ):
        assert mistake in text
    assert not re.search("validat|Recipe|Strict", text), "no name of ours"


@pytest.mark.parametrize("overrides", [["loop.max_steps=20"], ["loop.max_steps=1"]])
def test_shipped_recipes_run_for_a_few_steps(overrides, caplog):
    caplog.set_level("INFO", "isic_vq")
    for path in EXAMPLES:
        recipe_class, _ = STAGES[yaml.safe_load(path.read_text())["stage"]]
        if recipe_class in (VQVAERecipe, PriorRecipe, DecoderRecipe, ClassifierRecipe):
            caplog.clear()
            before, recipe = load_recipe(recipe_class, path, []), load_recipe(recipe_class, path, overrides)
            assert recipe.loop.warmup_steps <= recipe.loop.max_steps
            assert f"loop.max_steps is {recipe.loop.max_steps}, not {before.loop.max_steps}: " in caplog.text
        else:
            recipe = load_recipe(recipe_class, path, [f"vqvae.{overrides[0]}", f"prior.{overrides[0]}"])
            build_recipe(VQVAERecipe, recipe.vqvae)
            build_recipe(PriorRecipe, recipe.prior)


def test_warm_ups_keep_their_share_of_a_shorter_run_unless_they_are_named(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "loop: {max_steps: 1000, warmup_steps: 100}\ncodebook_warmup_steps: 200\nfrozen_norm_steps: 300\n"
    )
    recipe = load_recipe(VQVAERecipe, path, ["loop.max_steps=100", "codebook_warmup_steps=7"])
    assert (recipe.loop.warmup_steps, recipe.codebook_warmup_steps, recipe.frozen_norm_steps) == (10, 7, 30)
    longer = load_recipe(VQVAERecipe, path, ["loop.max_steps=2000"])
    assert (longer.loop.warmup_steps, longer.codebook_warmup_steps, longer.frozen_norm_steps) == (
        100,
        200,
        300,
    )


def test_a_resumed_run_keeps_the_warm_ups_it_was_begun_with(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'run'}\nloop: {{max_steps: 1000, warmup_steps: 100}}\ncodebook_warmup_steps: 200\n"
    )
    overrides = ["loop.max_steps=100"]
    begun = load_recipe(VQVAERecipe, path, overrides)
    assert load_recipe(VQVAERecipe, path, overrides, resume=True) == begun, "nothing is recorded yet"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(begun)))
    assert load_recipe(VQVAERecipe, path, overrides, resume=True) == begun
    shorter = load_recipe(VQVAERecipe, path, ["loop.max_steps=50"], resume=True)
    assert (shorter.loop.warmup_steps, shorter.codebook_warmup_steps) == (10, 20)
    assert load_recipe(VQVAERecipe, path, ["loop.max_steps=50"]).codebook_warmup_steps == 10
    (tmp_path / "run" / "recipe.yaml").write_text("- damaged")
    assert load_recipe(VQVAERecipe, path, overrides, resume=True) == begun


def test_keys_of_model_sections_are_those_of_the_configs():
    for recipe_class, model, config_class in (
        (VQVAERecipe, {}, VQVAEConfig),
        (PriorRecipe, {}, PixelCNNConfig),
        (PriorRecipe, {"model_type": "isic_var"}, VARConfig),
    ):
        found = {
            key.removeprefix("model.")
            for key in known_keys(recipe_class, {"model": model})
            if key.startswith("model.")
        }
        own = {field.name for field in dataclasses.fields(config_class)} - {
            field.name for field in dataclasses.fields(PreTrainedConfig)
        }
        assert found - {"preset", "model_type"} == own - {"model_type"}


def test_own_classes_of_a_recipe():
    recipe = load_recipe(VQVAERecipe, None, ["data.classes=[psoriasis, 3]", "data.drop_other_classes=true"])
    assert recipe.data.declared_classes == Classes(("psoriasis", "3"), "drop")
    assert VQVAERecipe().data.declared_classes is None
    assert load_recipe(VQVAERecipe, None, ["data.classes=auto"]).data.declared_classes.others == "take"
    with pytest.raises(RecipeError, match="data.classes holds True, which is not text: write it in quotes"):
        load_recipe(VQVAERecipe, None, ["data.classes=[yes]"])
