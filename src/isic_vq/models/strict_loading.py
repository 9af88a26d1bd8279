"""Loading that refuses weights which are not exactly the model's, or not safetensors.

transformers warns of missing and foreign tensors and goes on, the missing ones random; images would then be noise that
nobody asked for. Differs: here both are errors, unless the caller asks for the loading info to judge for themselves.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError

from .upload import explained


def share_weights(folder: Path) -> None:
    """Give a folder's weights the mode of its config; safetensors makes them readable by their owner alone."""
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)


def check_index(folder: Path) -> None:
    """Raise ValueError for an index of weights that names no files, or files outside of its folder."""
    for path in folder.glob("*.safetensors.index*.json"):
        try:
            index = json.loads(path.read_bytes())
            names = list(dict(index["weight_map"]).values())
            if not names or not isinstance(index["metadata"], dict):
                raise ValueError("it is empty")
            inside = all((folder / name).resolve().is_relative_to(folder.resolve()) for name in names)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path.name} has no weight_map of tensor names and files, or no metadata: save the model again"
            ) from error
        if not inside:
            raise ValueError(f"{path.name} names a file outside of {folder.name}: expected files in it")


class StrictLoading:
    """Mixed into a `PreTrainedModel`, before it in the list of bases."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load as `PreTrainedModel.from_pretrained` does, and refuse pickles, and missing and foreign tensors.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            args: passed on.
            output_loading_info: return `(model, info)` and refuse nothing.
            kwargs: passed on (`revision`, `subfolder`, `dtype`, `device_map`, `token`, ...).

        Raises:
            ValueError: tensors are missing, or some belong to no part of the model.
            OSError: the files cannot be read; as a `HubError`, they cannot be downloaded.
        """
        name = pretrained_model_name_or_path
        kwargs["use_safetensors"] = True
        if Path(str(name)).is_dir():
            check_index(Path(name) / kwargs.get("subfolder", ""))
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        except SafetensorError as error:
            raise OSError(
                f"a weights file of {name} is damaged ({error}): download it again with force_download=True, or copy it again"
            ) from error
        except (OSError, ValueError, HTTPError) as error:
            failure = (
                None if Path(str(name)).is_dir() else explained(error, str(name), kwargs.get("revision"))
            )
            if failure is None:
                raise
            raise failure from error
        if output_loading_info:
            return model, info
        model_type = cls.config_class.model_type  # type: ignore[attr-defined]  # of PreTrainedModel, beside this class
        for kind in ("missing_keys", "unexpected_keys"):
            if info[kind]:
                raise ValueError(
                    f"{name} is not a whole {model_type}: it has {len(info[kind])} {kind.replace('_', ' ')}, such as "
                    f"{sorted(info[kind])[:3]}; load a folder that save_pretrained of this class has written"
                )
        return model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as `PreTrainedModel.save_pretrained` does, all files with the mode that the umask gives new files."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        share_weights(Path(save_directory))
