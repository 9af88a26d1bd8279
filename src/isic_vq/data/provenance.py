"""The record of training images beside weights, which every later stage carries on.

`training_data.json` describes the images of each stage: the tokenizer's, the prior's, and those of the decoder's
fine-tuning if there was one. A stage whose images were not recorded is null.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from isic_vq.data.schema import DataError
from isic_vq.data.sources import SourceInfo
from isic_vq.files import write_atomically

TRAINING_DATA = "training_data.json"
PROVENANCE = "provenance.json"  # of a Hub repository, in which they are the entry `BY_STAGE`
BY_STAGE = "training_data_by_stage"

TrainingData = Mapping[str, SourceInfo | None]  # by stage: "vqvae", "prior", "decoder"


def write_training_data(folder: Path, data: TrainingData) -> None:
    """Write the description of the training images of the weights in a folder."""
    content = {stage: None if info is None else asdict(info) for stage, info in data.items()}
    write_atomically(folder / TRAINING_DATA, (json.dumps(content, indent=2) + "\n").encode())


def read_training_data(folder: Path) -> dict[str, SourceInfo | None]:
    """Read the description of the training images of the weights in a folder: empty if there is none, DataError if damaged."""
    path = folder / TRAINING_DATA
    if not path.is_file():
        path = folder / PROVENANCE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content.get(BY_STAGE, {}) if path.name == PROVENANCE else content
        return {stage: None if info is None else SourceInfo(**info) for stage, info in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{folder.name}/{path.name} is damaged ({error}): train again") from error


def licenses_of(data: Mapping[str, Mapping[str, Any] | None]) -> set[str]:
    """The licences of all training images, from `SourceInfo` dictionaries by stage; an unrecorded stage is "unknown"."""
    return {
        name for info in data.values() for name in (info["licenses"] if info is not None else ["unknown"])
    }
