"""What diffusers loads a part of the model with; the file `isic_vq.py` in each part's folder of a repository.

diffusers downloads this one file of the code and none that it imports, so it stands alone: it hands the part over to
transformers, which brings the rest of the code from the same repository, in the same revision.
"""

from pathlib import Path
from typing import Any

from transformers import AutoModel, PreTrainedModel


class _Part(PreTrainedModel):
    """A part of a repository, by the path of its folder."""

    @classmethod
    def from_pretrained(cls, path: str, **kwargs: Any) -> PreTrainedModel:
        """Load the part; the caller has trusted the repository's code, or this file would not run."""
        folder = Path(path)
        repository, options = str(folder.parent), {k: v for k, v in kwargs.items() if v is not None}
        options.pop("low_cpu_mem_usage", None)
        # .../models--user--name/snapshots/COMMIT, if diffusers downloaded it.
        cache = folder.parent.parent.parent
        if folder.parent.parent.name == "snapshots" and cache.name.startswith("models--"):
            repository = cache.name.removeprefix("models--").replace("--", "/")
            options |= {"revision": folder.parent.name, "cache_dir": str(cache.parent)}
        return AutoModel.from_pretrained(repository, subfolder=folder.name, trust_remote_code=True, **options)


class VQVAEModel(_Part):
    """The tokenizer."""


class PixelCNNModel(_Part):
    """The prior of a repository that has a PixelCNN."""


class VARModel(_Part):
    """The prior of a repository that has a VAR."""
