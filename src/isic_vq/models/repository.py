"""What makes a saved model a repository that every library opens, with this package and without it.

transformers reads `auto_map` and `custom_pipelines` in the configs and runs the code at the root; diffusers reads
`model_index.json`, runs `pipeline.py`, and loads each part with the module that lies in the part's folder.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCardData

from .configuration_isic_vq import TASK, IsicVQConfig
from .image_processing_isic_vq import IsicVQImageProcessor

CODE_FOLDER = Path(__file__).parent
PART_MODULE = "isic_vq"  # what `model_index.json` calls the module in a part's folder
TAGS = ["isic-vq", "vq-vae", "diffusers", "dermoscopy", "skin", "medical-imaging", "custom_code"]
PIPELINES = {
    TASK: {
        "impl": "auto_map.UnconditionalImageGenerationPipeline",
        "pt": ["AutoModel"],
        "type": "image",
    }
}


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
    """Add the code, and all that names it, to a folder that holds the configs and weights.

    Args:
        folder: the repository folder.
        parts: the parts' models by the names of their folders.
        config: the whole model's.
    """
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
    """The card of a model that comes without measurements: what it is and how it is opened, and no number.

    Args:
        name: the repository.
        config: the model's; its `license` is the card's.
        tags: more tags than the usual ones.
    """
    metadata = ModelCardData(
        license=config.license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=[*TAGS, *tags],
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
    _write_json(path, {**json.loads(path.read_text()), **fields})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
