"""Recipes from YAML files and `key=value` overrides, all mistakes in one message, before torch is imported."""

import ast
import copy
import dataclasses
import difflib
import logging
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from huggingface_hub.errors import StrictDataclassError

from isic_vq.data.errors import DataError
from isic_vq.data.uri import check_uri
from isic_vq.hub.pretrained import resolve
from isic_vq.training.recipe import DecoderRecipe, Recipe, RecipeError
from isic_vq.yaml_text import read_yaml

logger = logging.getLogger(__name__)

# What is counted in steps from the beginning of a run, or from its end.
WARM_UPS = (
    "loop.warmup_steps",
    "codebook_warmup_steps",
    "frozen_norm_steps",
    "adversarial_start",
    "discriminator_warmup",
)
# Modules of `isic_vq.models` whose fields a recipe's `model` section may have, by stage.
MODEL_CONFIGS = {
    "vqvae": ("configuration_vqvae",),
    "prior isic_pixelcnn": ("configuration_prior", "configuration_pixelcnn"),
    "prior isic_var": ("configuration_prior", "configuration_var"),
}


RecipeClass = TypeVar("RecipeClass")


def load_recipe(
    recipe_class: type[RecipeClass], config: Path | None, overrides: list[str], resume: bool = False
) -> RecipeClass:
    """Read a YAML file, apply `key=value` overrides (dots reach inside) and name all that is wrong in one RecipeError.

    An override of `loop.max_steps` by fewer steps shortens the file's warm-ups in proportion, and says so; a resumed run
    keeps those it was begun with.
    """
    fields = _read_fields(config)
    stage = recipe_class.stage  # type: ignore[attr-defined]  # every recipe has one
    if fields.get("stage", stage) != stage:
        raise RecipeError(f"this is a {fields['stage']!r} recipe: expected a {stage!r} one")
    before = copy.deepcopy(fields)
    problems = [problem for override in overrides if (problem := _apply_override(fields, override))]
    recorded = _recorded_recipe(recipe_class, fields) if resume else {}
    _shorten_warm_ups(recipe_class, before, fields, {text.partition("=")[0] for text in overrides}, recorded)
    return build_recipe(recipe_class, fields, problems)


def load_stage(config: Path | None, overrides: list[str], resume: bool = False) -> Recipe:
    """Read a training recipe as `load_recipe` does, of the class that its `stage` names; RecipeError if it names none."""
    stages = {recipe_class.stage: recipe_class for recipe_class in get_args(Recipe)}
    fields = _read_fields(config)
    for override in overrides:
        if override.startswith("stage="):
            _apply_override(fields, override)
    stage = fields.get("stage")
    if not isinstance(stage, str) or stage not in stages:
        what = "no stage is named" if stage is None else f"stage is {stage!r}"
        raise RecipeError(f"{config or 'the recipe'}: {what}, expected one of {', '.join(stages)}")
    return load_recipe(stages[stage], config, overrides, resume)


def _read_fields(config: Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    if not config.is_file():
        raise RecipeError(f"{config} is not a file: expected a YAML recipe, such as one of examples/configs")
    try:
        fields = read_yaml(config.read_text(encoding="utf-8")) or {}
    except ValueError as error:
        raise RecipeError(f"{config} is not YAML: {error}") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{config} holds a {type(fields).__name__}: expected keys and values")
    return fields


def check_places(recipe: Recipe) -> None:
    """Refuse images, codes and models that a recipe names and that do not exist, before torch is imported."""
    data = getattr(recipe, "data", None)
    for uri in (data.train, data.validation) if data is not None else ():
        if uri:
            check_uri(uri)
    for name in ("train_codes", "validation_codes"):
        path = getattr(recipe, name, "")
        if path and not Path(path).is_file():
            raise DataError(f"{name}: {path} is not a file: write it with isic-vq encode")
    for name in ("tokenizer", "feature_model", *(("model",) if isinstance(recipe, DecoderRecipe) else ())):
        if getattr(recipe, name, ""):
            resolve(getattr(recipe, name))


def _recorded_recipe(recipe_class: type, fields: dict[str, Any]) -> dict[str, Any]:
    """The recipe in the output folder; {} where it is missing or damaged, which `open_run` reports."""
    path = Path(str(_value(fields, "output_dir", recipe_class))) / "recipe.yaml"
    try:
        recorded = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _apply_override(fields: dict[str, Any], override: str) -> str | None:
    key, separator, text = override.partition("=")
    if not separator:
        return f"{override!r} is not an override: expected key=value, such as loop.max_steps=200"
    try:
        return _set(fields, key, read_yaml(text))
    except ValueError:
        return f"{override!r} is not YAML after the =: put the value in quotes"


def _set(fields: dict[str, Any], key: str, value: Any) -> str | None:
    """Set the value of a dotted key; returns what is wrong with the key."""
    *sections, last = key.split(".")
    for section in sections:
        fields = fields.setdefault(section, {})
        if not isinstance(fields, dict):
            return f"{key!r} reaches inside {section!r}, which is a value"
    fields[last] = value
    return None


def _value(fields: Any, key: str, recipe_class: Any = None) -> Any:
    """The value of a dotted key, by default that of the recipe's class; None where there is neither."""
    default = recipe_class() if recipe_class is not None else None
    for name in key.split("."):
        fields = fields.get(name) if isinstance(fields, dict) else None
        default = getattr(default, name, None)
    return default if fields is None else fields


def _shorten_warm_ups(
    recipe_class: type,
    before: dict[str, Any],
    fields: dict[str, Any],
    overridden: Collection[str],
    recorded: dict[str, Any],
) -> None:
    """Shorten warm-ups, counted in steps, where an override shortens the run; `recorded` ones of a resumed run stay."""
    for key in overridden:
        section = key.removesuffix("loop.max_steps")  # a study's recipe has two, vqvae. and prior.
        if section == key:
            continue
        base = None if section else recipe_class
        steps, old_steps = _value(fields, key), _value(before, key, base)
        if type(steps) is not int or type(old_steps) is not int or not 0 < steps < old_steps:
            continue
        changes = []
        for name in WARM_UPS:
            old = _value(before, section + name, base)
            if section + name not in overridden and type(old) is int and old > 0:
                new = _value(recorded, section + name)
                if new is None:
                    new = min(steps - 1, max(int(name != "frozen_norm_steps"), old * steps // old_steps))
                _set(fields, section + name, new)
                changes.append(f"{section}{name} from {old} to {new}")
        if changes:
            logger.info("%s is %d, not %d: %s", key, steps, old_steps, ", ".join(changes))


def build_recipe(
    cls: type[RecipeClass], fields: dict[str, Any], problems: Sequence[str] = (), prefix: str = ""
) -> RecipeClass:
    """Construct a recipe from nested dictionaries; one RecipeError names the given problems, unknown keys and wrong values."""
    problems = [*problems]
    keys = [f"{prefix}{key}" for key in known_keys(cls, fields)]
    recipe = _build(cls, fields, prefix, keys, problems)
    if len(problems) == 1:
        raise RecipeError(problems[0])
    if problems:
        raise RecipeError(f"{len(problems)} mistakes in the recipe: {' | '.join(problems)}")
    return recipe


def _build(
    cls: type[RecipeClass], fields: dict[str, Any], prefix: str, keys: list[str], problems: list[str]
) -> RecipeClass:
    """A recipe of the fields that fit; appends to `problems` what is wrong with the others."""
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for name, value in fields.items():
        kind = known[name].type if name in known else None
        if name not in known:
            problems.append(unknown_key(f"{prefix}{name}", keys))
        elif not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            values[name] = value
        elif isinstance(value, dict):
            values[name] = _build(kind, value, f"{prefix}{name}.", keys, problems)
        else:
            problems.append(f"{prefix}{name} is {value!r}: expected keys and values")
    section = f"{prefix}model."
    if isinstance(values.get("model"), dict) and any(key.startswith(section) for key in keys):
        names = [section + key for key in values["model"]]
        problems += [unknown_key(name, keys) for name in names if name not in keys]
    first = len(problems)
    while True:
        try:
            return cls(**values)
        except StrictDataclassError as error:
            problem = strict_message(error, prefix, known)
        match = re.match(r"\w+", problem.removeprefix(prefix))
        name = match[0] if match else ""
        # A check of a default beside the recipe's values says nothing of the recipe, unless it is all there is to say.
        if name in values or len(problems) == first:
            problems.append(problem)
        if name not in values:
            return cls()
        del values[name]


def strict_message(error: Exception, prefix: str, names: Collection[str]) -> str:
    """What an error of a `strict` class with fields of these names says, without the name of the check."""
    text = str(error.__cause__ or error)
    match = re.fullmatch(r"Field '(\w+)'(?: with value .*?)? (.*?)(?: \(value: (.*)\))?", text, re.DOTALL)
    if match is not None:
        field, problem, value = match.groups()
        got = "" if value is None else f" ({value})"
        kinds = re.findall(r"' expected ([\w ]+), got (\w+)", problem)  # of a union, each
        if kinds:
            problem = f"expected {' or '.join(kind for kind, _ in kinds)}, got {kinds[0][1]}"
        return f"{prefix}{field}: {problem}{got}"
    first = re.match(r"\w+", text)
    return f"{prefix}{text}" if first is not None and first[0] in names else text


def known_keys(cls: type, fields: dict[str, Any]) -> list[str]:
    """All keys of a recipe with dots, with those of its model's config where that is one of this package's."""
    keys = []
    for field in dataclasses.fields(cls):
        keys.append(field.name)
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            keys += [f"{field.name}.{key}" for key in known_keys(field.type, {})]
    model, kind = fields.get("model"), str(getattr(cls, "stage", None))
    if kind == "prior":
        kind += f" {model.get('model_type', 'isic_pixelcnn') if isinstance(model, dict) else 'isic_pixelcnn'}"
    for module in MODEL_CONFIGS.get(kind, ()):
        keys += [f"model.{name}" for name in _config_fields(module)]
    if "model.num_codes" in keys:
        keys.append("model.preset" if kind == "vqvae" else "model.model_type")
    return keys


def _config_fields(module: str) -> list[str]:
    """Fields of a model's config by its source: importing it would import torch, only to tell of a misspelt key."""
    tree = ast.parse((Path(__file__).parents[1] / "models" / f"{module}.py").read_text(encoding="utf-8"))
    statements = (
        statement for node in tree.body if isinstance(node, ast.ClassDef) for statement in node.body
    )
    return [
        statement.target.id
        for statement in statements
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and not ast.unparse(statement.annotation).startswith("ClassVar")
    ]


def unknown_key(key: str, keys: Collection[str]) -> str:
    """Message for an unknown key, with the known one that was probably meant."""
    section, _, name = key.rpartition(".")
    beside = [other for other in keys if other.rpartition(".")[0] == section]
    close = [other for other in keys if other.rpartition(".")[2] == name]
    for others, cutoff in ((beside, 0.6), (keys, 0.8)):
        last = {other.rpartition(".")[2]: other for other in others}
        close = close or [last[other] for other in difflib.get_close_matches(name, last, n=1, cutoff=cutoff)]
    if close:
        return f"unknown recipe key {key}: did you mean {' or '.join(close)}?"
    return f"unknown recipe key {key}. Known: {', '.join(beside or keys)}"
