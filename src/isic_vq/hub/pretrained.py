"""Find and open checkpoints: the shipped one, a folder, or a Hub repository.

Opening is strict: a folder of another class is refused by name, where transformers alone would warn and go on.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedModel

    Model = TypeVar("Model", bound=PreTrainedModel)

KINDS = {
    "isic_vq": "a whole model",
    "isic_vqvae": "a tokenizer",
    "isic_pixelcnn": "a PixelCNN prior",
    "isic_var": "a VAR prior",
}
DEFAULT_CHECKPOINT = "isic-vq-128"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ModelError(ValueError):
    """A checkpoint that is missing, damaged or of another class."""


def default_checkpoint() -> Path:
    """Folder of the shipped checkpoint, inside an installed wheel or in `model_cards/` of a clone; ModelError without any."""
    for folder in _default_places():
        if (folder / "config.json").is_file():
            return folder
    raise ModelError(f"the checkpoint {DEFAULT_CHECKPOINT} is not part of this installation: name a model")


def _default_places() -> list[Path]:
    package = Path(__file__).resolve().parents[1]
    return [
        place / DEFAULT_CHECKPOINT for place in (package / "checkpoints", package.parents[1] / "model_cards")
    ]


def is_default(model: str) -> bool:
    """Whether a model's folder is that of the shipped checkpoint, which commands take unasked."""
    return Path(model).resolve() in _default_places()


def resolve(model: str | None) -> str:
    """Return the folder or Hub id of a model as a user calls it; None and "isic-vq-128" are the shipped checkpoint."""
    path = Path(model or DEFAULT_CHECKPOINT)
    if model is None or (model == DEFAULT_CHECKPOINT and not path.exists()):
        return str(default_checkpoint())
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{model} holds no config.json: expected a model folder, such as a run's model/")
        return model
    if path.exists() or not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model} is neither a model folder nor a Hub id such as user/isic-vq-128")
    return model


def class_names_of(model: str) -> dict[int, str] | None:
    """Read the classes of a model's folder, id to name, without loading it; None if its config does not tell them."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        return {int(index): str(name) for index, name in config["prior_config"]["id2label"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def load_model(model_class: "type[Model]", model: str | None = None, device: str | None = None) -> "Model":
    """Open a checkpoint as `model_class`, in eval mode.

    Args:
        model_class: `IsicVQModel`, `VQVAEModel` or a prior's class.
        model: as `resolve` takes it.
        device: such as "cpu", "cuda:1" or "mps"; by default the first GPU if there is one, the CPU otherwise.

    Raises:
        ModelError: the checkpoint is of another class, or its tensors are not exactly the model's; or there is no such device.
        OSError: a Hub repository cannot be reached.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    place = find_device(device)
    name = resolve(model)
    path = Path(name)
    if path.is_dir():
        _check_class(path, model_class)
    try:
        # from_pretrained itself says what is wrong with a repository and who may read it.
        config = _read_config(path, model_class) if path.is_dir() else None
        loaded = model_class.from_pretrained(name, config=config)
    except (StrictDataclassError, RuntimeError, ValueError, OSError) as error:
        if (
            isinstance(error, OSError)
            and not isinstance(error.__cause__, SafetensorError)
            and not path.is_dir()
        ):
            raise  # the Hub, not the folder
        kind = KINDS.get(model_class.config_class.model_type, "a model")
        reason = error.__cause__ or error if isinstance(error, StrictDataclassError) else error
        raise ModelError(f"{path.name} cannot be read as {kind}: {reason}") from error
    return loaded.to(place)


def find_device(device: str | None = None) -> "torch.device":
    """The device of a name, by default the first GPU or else the CPU; ModelError for one that has no tensors."""
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=device).item()  # which a meta device refuses
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ModelError(f"device {device!r} cannot be used ({reason}): expected cpu, cuda or mps") from error
    return torch.device(device)


def _read_config(path: Path, model_class: "type[PreTrainedModel]") -> "PreTrainedConfig":
    """Read the configuration of a folder, and refuse one of a larger model than its weights can fill."""
    import torch

    try:
        config = model_class.config_class.from_pretrained(str(path))
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            if not isinstance(part.dtype, torch.dtype | None):
                raise TypeError(f"dtype is {part.dtype!r}")
            if part.model_type != type(part).model_type:
                raise TypeError(f"model_type is {part.model_type!r}")
    except (TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise ValueError(f"config.json is none that save_pretrained writes: {error}") from error
    size = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    if getattr(config, "least_parameters", 0) > max(size, 2**24):
        raise ValueError(
            f"config.json asks for at least {config.least_parameters:,} parameters, and the weights are {size:,} bytes"
        )
    return config


def _check_class(folder: Path, model_class: "type[PreTrainedModel]") -> None:
    """Refuse a folder whose config is neither the class's nor that of a whole that contains it."""
    config = read_object(folder / "config.json")
    wanted = model_class.config_class
    kind, part = config.get("model_type"), config.get(wanted.base_config_key)
    if wanted.model_type not in (kind, part.get("model_type") if isinstance(part, dict) else None):
        raise ModelError(
            f"{folder.name} is {KINDS.get(str(kind), f'a {kind!r} checkpoint')}: expected "
            f"{KINDS.get(wanted.model_type, wanted.model_type)}"
        )


def read_object(path: Path) -> dict[str, Any]:
    """Read a file's JSON object; ModelError if it is something else."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error}): expected what isic-vq export writes") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object: expected what isic-vq export writes")
    return content
