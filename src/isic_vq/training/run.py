"""A run's folder: its recipe, its name, where it was run, on what data, and the models it leaves for others."""

import dataclasses
import json
import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers.configuration_utils import PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_utils import PreTrainedModel

from isic_vq.data.provenance import TrainingData, write_training_data
from isic_vq.evaluation.report import environment
from isic_vq.files import replaced_directory, write_atomically
from isic_vq.models.configuration_vqvae import PRESETS
from isic_vq.models.strict_loading import share_weights
from isic_vq.training.load import strict_message, unknown_key
from isic_vq.training.processes import Processes, TrainingError
from isic_vq.training.recipe import Recipe, RecipeError, public_recipe
from isic_vq.work import differences, differences_text, flat
from isic_vq.yaml_text import read_yaml

logger = logging.getLogger(__name__)

Config = TypeVar("Config", bound=PreTrainedConfig)


def known_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """Names of a config's fields without those of every model's config."""
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name for field in dataclasses.fields(config_class)} - general


def build_config(config_class: type[Config], fields: dict[str, Any]) -> Config:
    """Construct a model config; RecipeError for an unknown key (transformers would store it silently) or a wrong value."""
    fields = dict(fields)
    preset = fields.pop("preset", None)
    if preset is not None:
        if preset not in PRESETS:
            raise RecipeError(f"model.preset is {preset!r}: expected one of {sorted(PRESETS)}")
        fields = {**PRESETS[preset], **fields}
    known = known_fields(config_class)
    unknown = sorted(set(fields) - known)
    if unknown:
        raise RecipeError(unknown_key(f"model.{unknown[0]}", [f"model.{name}" for name in sorted(known)]))
    try:
        return config_class(**fields)
    except Exception as error:  # strict raises its own family, not ValueError
        raise RecipeError(strict_message(error, "model.", known)) from error


# Keys of a recipe that may change when a run is resumed: its length, its files and the places that it reads from. That the
# images are the same is checked by their hashes.
MAY_CHANGE = {
    "output_dir",
    "data.train",
    "data.validation",
    "data.cache",
    "data.max_corrupt_share",
    "loop.max_steps",
    "loop.save_every",
    "loop.keep_checkpoints",
    "loop.num_workers",
    "loop.trackers",
    "loop.project",
    "loop.profile",
    "loop.process_timeout",
}
RECIPE, RUN = "recipe.yaml", "run.json"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder, which holds everything that it writes."""

    folder: Path
    identifier: str  # eight hexadecimal digits; a resumed run keeps them, and so the trackers' run
    resumes: bool = False  # from a checkpoint


def open_run(recipe: Recipe, sources: Mapping[str, Any], resume: bool, processes: Processes) -> Run:
    """Begin a run's folder, or with `resume` continue from its newest checkpoint if nothing has changed that decides the result.

    `sources` holds, by name, descriptions of images, or the sha256 of what else it is trained on.
    """
    folder = Path(recipe.output_dir)
    data = {
        name: {"sha256": source} if isinstance(source, str) else dataclasses.asdict(source)
        for name, source in sources.items()
    }
    settings = public_recipe(recipe)
    began: dict[str, Any] = {"identifier": secrets.token_hex(4)}
    resumes = any((folder / "checkpoints").glob("step-*"))
    if resumes and not resume:
        raise TrainingError(f"{folder.name} already holds a run: --resume it, or choose another output_dir")
    if not resumes and (folder / "report.json").exists():
        raise TrainingError(f"{folder.name} holds a finished run: choose another output_dir")
    if resumes:
        began = _same_run(folder, recipe, settings, data)
    elif resume:
        logger.warning("%s holds no checkpoint yet: the run starts at step 0", folder.name)
    processes.wait()  # every process has looked before one writes
    identifier = processes.from_main(began["identifier"])
    if processes.is_main:
        began |= {"data": data, "environment": environment()}
        write_atomically(folder / RECIPE, yaml.safe_dump(settings, sort_keys=False).encode())
        write_atomically(folder / RUN, json.dumps(began, indent=2).encode())
    return Run(folder, identifier, resumes)


def _same_run(folder: Path, recipe: Recipe, settings: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What `run.json` keeps of the run in the folder: its identifier, and all changes of the recipe so far."""
    try:
        run = json.loads((folder / RUN).read_text(encoding="utf-8"))
        recorded = read_yaml((folder / RECIPE).read_text(encoding="utf-8"))
        began, identifier, changes = run["data"], run["identifier"], run.get("changes", [])
        defaults = flat(public_recipe(type(recipe)()))  # of keys that an older version did not have
        begun = {**defaults, **flat(recorded), "stage": recorded["stage"]}
        different = differences(begun, settings)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise TrainingError(
            f"{folder.name} does not say how its run was begun ({RECIPE}, {RUN}: {error}): choose another output_dir"
        ) from error
    refused = {key: values for key, values in different.items() if key not in MAY_CHANGE}
    if refused:
        raise TrainingError(
            f"{folder.name} was begun with {differences_text(refused)}: resume it with the recorded values, or choose another output_dir"
        )
    for name, info in data.items():
        before = began.get(name, {})
        # Runs of older versions recorded less.
        if any(
            before.get(key) not in (None, info.get(key)) for key in ("fingerprint", "ids_sha256", "sha256")
        ):
            raise TrainingError(f"the {name} data differ from those of before: choose another output_dir")
    newest = max(path.name for path in (folder / "checkpoints").glob("step-*"))
    for key, (old, new) in different.items():
        if key != "output_dir":
            logger.info("the run continues with %s = %r; until %s it was %r", key, new, newest, old)
            changes = [*changes, {"after": newest, "key": key, "from": old, "to": new}]
    return {"identifier": identifier, **({"changes": changes} if changes else {})}


def save_model(
    folder: Path, *parts: PreTrainedModel | ImageProcessingMixin, training_data: TrainingData | None = None
) -> None:
    """Replace a folder by a model, its image processor if it has one, and what the weights were trained on, at once."""
    with replaced_directory(folder) as temporary:
        for part in parts:
            part.save_pretrained(temporary)
        share_weights(temporary)
        if training_data is not None:
            write_training_data(temporary, training_data)
