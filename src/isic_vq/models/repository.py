"""Save a model as a repository that every library opens, with this package and without it.

transformers reads `auto_map` and `custom_pipelines` in the configs and runs the code at the root; diffusers reads
`model_index.json`, runs `pipeline.py`, and loads each part with the module that lies in the part's folder.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCardData
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .configuration_isic_vq import TASK, IsicVQConfig
from .image_processing_isic_vq import IsicVQImageProcessor
from .strict_loading import share_weights
from .upload import full_name, upload_folder

CODE_FOLDER = Path(__file__).parent
PART_MODULE = "isic_vq"  # what `model_index.json` calls the module in a part's folder
TAGS = ["isic-vq", "vq-vae", "diffusers", "dermoscopy", "skin", "medical-imaging", "custom_code"]
PARTS = ("vqvae", "prior")
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
PIPELINE = "auto_map.UnconditionalImageGenerationPipeline"
PIPELINES = {TASK: {"impl": PIPELINE, "pt": ["AutoModel"], "type": "image"}}


class SavedInParts:
    """Mixed into a composite `PreTrainedModel`, before it in the list of bases: how it is saved and pushed.

    A saved folder holds `config.json`, `model.safetensors.index.json` and one subfolder per part (`vqvae/`, `prior/`) with
    its own config and weights. Tensor names inside the parts carry the part's prefix, so that transformers reads the whole
    through the index and each part through its subfolder or its class.
    """

    config: IsicVQConfig

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str | None = None,
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save a repository: the whole and each part load from the folder, with this package and without it.

        Files are written beside and then moved into place, the index last: a folder that was interrupted in between
        does not load. Other files in the folder stay, except weights that would be read instead of these.

        Args:
            save_directory: the folder, made if need be.
            is_main_process: False does nothing.
            state_dict: weights to save instead of the model's.
            push_to_hub: also push, with the other arguments of `push_to_hub`, to `repo_id` or to a repository of the
                folder's name.
            max_shard_size: has no effect, each part is one file.
            variant: not supported.
            kwargs: passed on to `PreTrainedModel.save_pretrained`, but for those of `push_to_hub`.

        Raises:
            ValueError: a variant, or other weights together with a push.
        """
        folder = Path(save_directory)
        push = {key: kwargs.pop(key) for key in signature(self.push_to_hub).parameters if key in kwargs}
        repo_id = push.pop("repo_id", None) or folder.name
        if variant is not None:
            raise ValueError(f"variant is {variant!r}: expected None, a repository has one set of weights")
        if push_to_hub and state_dict is not None:
            raise ValueError(
                "state_dict and push_to_hub are both given: load the weights first, then push the model"
            )
        if not is_main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with staging_folder(folder) as staged:
            self._save_parts(staged, state_dict, **kwargs)
            write_doors(staged, {part: getattr(self, part) for part in PARTS}, self.config)
            # A single file at the root would win over the index.
            stale = (folder / WEIGHTS_FILE, folder / INDEX_FILE, *folder.glob("model-*-of-*.safetensors"))
            for path in stale:
                path.unlink(missing_ok=True)
            files = [path for path in staged.rglob("*") if path.is_file()]
            for file in sorted(files, key=lambda path: path.name == INDEX_FILE):
                target = folder / file.relative_to(staged)
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)
        if push_to_hub:
            self.push_to_hub(repo_id, **push)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload model",
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: Sequence[str] = (),
        max_shard_size: int | str | None = None,
        safe_serialization: bool = True,
    ) -> str:
        """Make a repository of the Hub hold this model, in one commit that is checked by hash.

        The repository becomes exactly what `save_pretrained` writes, with a plain card: reports, previews, licence files and
        the card of other weights go, for they would describe these falsely. The card states `config.license`; what
        else a licence asks for, such as attribution, is yours to add. `isic-vq push` publishes a folder with all that.

        Args:
            repo_id: "user/name"; made if it does not exist.
            commit_message: title of the commit or pull request.
            commit_description: its text.
            private: visibility of the repository; None leaves it as it is.
            token: a Hub token; by default that of the login.
            revision: the branch, made if it does not exist; main by default.
            create_pr: propose the commit as a pull request.
            tags: more tags for the card.
            max_shard_size: has no effect, each part is one file.
            safe_serialization: has no effect, weights are safetensors.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            HubError: the Hub refuses, is not reached, or holds something else afterwards.
        """
        with TemporaryDirectory() as name:
            folder = Path(name)
            self.save_pretrained(folder)
            (folder / "README.md").write_text(
                plain_card(full_name(repo_id, token), self.config, tags), encoding="utf-8"
            )
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            result = upload_folder(
                folder,
                files,
                repo_id,
                commit_message=commit_message,
                commit_description=commit_description,
                private=private,
                create_pr=create_pr,
                revision=revision,
                token=token,
            )
        return result.pr_url or result.url

    def _save_parts(self, folder: Path, state_dict: dict[str, Tensor] | None, **kwargs: Any) -> None:
        """Write the configs and, split by part, the weights and their index."""
        for part in PARTS:  # first, because the root config holds the parts' configs too
            module = getattr(self, part)
            module.config.architectures, module.config.dtype = [type(module).__name__], module.dtype
        super().save_pretrained(folder, state_dict=state_dict, **kwargs)  # type: ignore[misc]
        single = folder / WEIGHTS_FILE
        weight_map: dict[str, str] = {}
        total_size = 0
        with safe_open(single, "pt") as file:
            for part in PARTS:
                tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith(f"{part}.")}  # noqa: SIM118
                (folder / part).mkdir()
                save_file(tensors, folder / part / WEIGHTS_FILE, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(tensors, f"{part}/{WEIGHTS_FILE}")
                total_size += sum(tensor.nbytes for tensor in tensors.values())
                getattr(self, part).config.save_pretrained(folder / part)
                share_weights(folder / part)
        single.unlink()
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder inside another, and remove those that killed processes of this host left there."""
    host = socket.gethostname()
    for left in folder.glob(f".saving-{host}-*"):
        pid = left.name.removeprefix(f".saving-{host}-").partition("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(left, ignore_errors=True)
        except (ValueError, PermissionError):
            continue  # not ours to judge
    with TemporaryDirectory(dir=folder, prefix=f".saving-{host}-{os.getpid()}-") as name:
        yield Path(name)


def write_doors(folder: Path, parts: dict[str, Any], config: IsicVQConfig) -> None:
    """Add the code, and all that names it, to a folder that holds the configs and weights of the parts."""
    for file in CODE_FOLDER.glob("*.py"):
        if file.name != "__init__.py":
            shutil.copyfile(file, folder / file.name)
    auto_map = {"AutoConfig": "auto_map.IsicVQConfig", "AutoModel": "auto_map.IsicVQModel"}
    _update_json(folder / "config.json", auto_map=auto_map, custom_pipelines=PIPELINES)
    IsicVQImageProcessor(size=config.vqvae_config.image_size).save_pretrained(folder)
    processor_map = {"AutoImageProcessor": "auto_map.IsicVQImageProcessor"}
    _update_json(folder / "preprocessor_config.json", auto_map=processor_map)
    index: dict[str, Any] = {"_class_name": ["pipeline", "IsicVQPipeline"], "license": config.license}
    for name, part in parts.items():
        model, model_config = type(part).__name__, type(part.config).__name__
        auto_map = {"AutoConfig": f"auto_map.{model_config}", "AutoModel": f"auto_map.{model}"}
        _update_json(folder / name / "config.json", auto_map=auto_map)
        shutil.copyfile(CODE_FOLDER / "component.py", folder / name / f"{PART_MODULE}.py")
        index[name] = [PART_MODULE, model]
    _write_json(folder / "model_index.json", index)


def plain_card(name: str, config: IsicVQConfig, tags: Sequence[str] = ()) -> str:
    """Write the card of a model without measurements: what it is and how it is opened, and no number."""
    metadata = ModelCardData(
        license=config.license, library_name="transformers", pipeline_tag=TASK, tags=[*TAGS, *tags]
    )
    return f"""---
{metadata.to_yaml()}
---

# {name}

A VQ-VAE tokenizer and a prior over its codes that generate images, made with isic-vq. Nothing was measured for this card.

**For research on synthetic images. It is not a diagnostic device: do not use it, or images from it, to judge a
person's skin.**

```python
from transformers import pipeline

pipe = pipeline(model="{name}", trust_remote_code=True)  # False once isic_vq is installed and imported
images = pipe(num_images=8, seed=0)
```
"""


def _update_json(path: Path, **fields: Any) -> None:
    _write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **fields})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
