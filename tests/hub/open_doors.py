"""Open doors of a repository, each in a process of its own; run by `doors.py` with an environment per place.

Reads `{"repo": ..., "doors": [...], "package": bool, "image": path}` from standard input and writes a line of JSON per
door. The libraries are imported once and the processes forked from there, because importing them takes seconds; the
package itself, or the repository's code, is imported by each process alone.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

warnings.filterwarnings("ignore")
torch.set_num_threads(1)

SEED = 0
NUM_IMAGES = 2
LABEL = "melanoma"
TASK = "unconditional-image-generation"


def generated(model: Any) -> np.ndarray:
    """Codes that the whole model samples."""
    return model.generate(NUM_IMAGES, LABEL, seed=SEED).codes.numpy()


def encoded(tokenizer: Any) -> np.ndarray:
    """Codes that the tokenizer makes of a picture that is a formula."""
    side = tokenizer.config.image_size
    ramp = torch.linspace(0, 1, side, dtype=torch.float64)
    planes = [ramp[:, None].expand(side, side), ramp[None].expand(side, side), (ramp[:, None] - ramp).abs()]
    return tokenizer.encode(torch.stack(planes)[None].float()).numpy()


def sampled(prior: Any) -> np.ndarray:
    """Codes that the prior samples from fixed noise."""
    generator = torch.Generator().manual_seed(SEED)
    positions = prior.config.grid_size**2
    uniforms = torch.rand((NUM_IMAGES, positions), generator=generator, dtype=torch.float64)
    first = torch.zeros(NUM_IMAGES, dtype=torch.int64)
    return prior.sample(uniforms, first, clusters=first if prior.config.num_clusters else None).numpy()


def processed(processor: Any) -> np.ndarray:
    """Pixels that the image processor makes of a file."""
    return processor(IMAGE, return_tensors="np")["pixel_values"]


def piped(pipe: Any) -> np.ndarray:
    """Codes that the transformers pipeline samples."""
    return pipe(LABEL, num_images=NUM_IMAGES, seed=SEED, return_codes=True)["codes"].numpy()


def diffused(pipe: Any) -> np.ndarray:
    """Codes that the diffusers pipeline samples."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(LABEL, num_images=NUM_IMAGES, seed=SEED, output_type="latent").images.numpy()


def own(name: str) -> Any:
    """A class of the package."""
    import isic_vq

    return getattr(isic_vq, name)


def auto(name: str) -> Any:
    """A class of transformers."""
    import transformers

    return getattr(transformers, name)


def transformers_pipeline(*arguments: Any, **settings: Any) -> Any:
    from transformers import pipeline

    return pipeline(*arguments, **settings)


def diffusion_pipeline() -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline


TRUST = {"trust_remote_code": True}
WITH_PACKAGE: dict[str, Callable[[str], np.ndarray]] = {
    "IsicVQModel": lambda repo: generated(own("IsicVQModel").from_pretrained(repo)),
    "IsicVQModel, revision": lambda repo: generated(own("IsicVQModel").from_pretrained(repo, revision="v1")),
    "VQVAEModel": lambda repo: encoded(own("VQVAEModel").from_pretrained(repo)),
    "VQVAEModel, subfolder": lambda repo: encoded(own("VQVAEModel").from_pretrained(repo, subfolder="vqvae")),
    "PixelCNNModel": lambda repo: sampled(own("PixelCNNModel").from_pretrained(repo)),
    "PixelCNNModel, subfolder": lambda repo: sampled(
        own("PixelCNNModel").from_pretrained(repo, subfolder="prior")
    ),
    "AutoModel": lambda repo: generated(auto("AutoModel").from_pretrained(repo)),
    "AutoModel, subfolder vqvae": lambda repo: encoded(
        auto("AutoModel").from_pretrained(repo, subfolder="vqvae")
    ),
    "AutoModel, subfolder prior": lambda repo: sampled(
        auto("AutoModel").from_pretrained(repo, subfolder="prior")
    ),
    "AutoImageProcessor": lambda repo: processed(auto("AutoImageProcessor").from_pretrained(repo)),
    "IsicVQImageProcessor": lambda repo: processed(own("IsicVQImageProcessor").from_pretrained(repo)),
    "pipeline(task, model)": lambda repo: piped(transformers_pipeline(TASK, model=repo)),
    "pipeline(model)": lambda repo: piped(transformers_pipeline(model=repo)),
    "IsicVQPipeline": lambda repo: diffused(own("IsicVQPipeline").from_pretrained(repo)),
    "DiffusionPipeline": lambda repo: diffused(diffusion_pipeline().from_pretrained(repo)),
    "DiffusionPipeline, trusted": lambda repo: diffused(diffusion_pipeline().from_pretrained(repo, **TRUST)),
}
WITHOUT_PACKAGE: dict[str, Callable[[str], np.ndarray]] = {
    "AutoModel": lambda repo: generated(auto("AutoModel").from_pretrained(repo, **TRUST)),
    "AutoModel, revision": lambda repo: generated(
        auto("AutoModel").from_pretrained(repo, revision="v1", **TRUST)
    ),
    "AutoModel, subfolder vqvae": lambda repo: encoded(
        auto("AutoModel").from_pretrained(repo, subfolder="vqvae", **TRUST)
    ),
    "AutoModel, subfolder prior": lambda repo: sampled(
        auto("AutoModel").from_pretrained(repo, subfolder="prior", **TRUST)
    ),
    "AutoModel, not trusted": lambda repo: generated(
        auto("AutoModel").from_pretrained(repo, trust_remote_code=False)
    ),
    "AutoImageProcessor": lambda repo: processed(auto("AutoImageProcessor").from_pretrained(repo, **TRUST)),
    "pipeline(task, model)": lambda repo: piped(transformers_pipeline(TASK, model=repo, **TRUST)),
    "pipeline(model)": lambda repo: piped(transformers_pipeline(model=repo, **TRUST)),
    "DiffusionPipeline": lambda repo: diffused(diffusion_pipeline().from_pretrained(repo, **TRUST)),
}


def open_door(name: str, repo: str, package: bool) -> dict[str, Any]:
    """What comes out of a door: numbers, or the error that keeps it shut."""
    if package:
        import isic_vq  # noqa: F401  # what a user writes first
    else:
        sys.modules["isic_vq"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        result = (WITH_PACKAGE if package else WITHOUT_PACKAGE)[name](repo)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"shape": result.shape, "dtype": str(result.dtype), "values": result.ravel().tolist()}


def main() -> None:
    """Open every door that standard input names."""
    import diffusers
    import transformers.pipelines  # noqa: F401

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity_error()
    _ = diffusers.DiffusionPipeline  # imports the rest of it
    for name in TASKS["doors"]:
        sys.stdout.flush()
        if (child := os.fork()) == 0:
            try:
                outcome = {"door": name, **open_door(name, TASKS["repo"], TASKS["package"])}
                os.write(RESULTS, json.dumps(outcome).encode() + b"\n")
            finally:
                os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    TASKS = json.load(sys.stdin)
    IMAGE = TASKS["image"]
    RESULTS = os.dup(1)
    os.dup2(2, 1)  # what libraries print is not a result
    main()
