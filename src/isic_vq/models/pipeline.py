"""The pipeline for diffusers: `DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)`.

Without the package diffusers runs this file alone, under a name that all repositories share. So it imports none of its
siblings, and all that it does lies in the class: the model's code is found beside the parts it was given.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import count
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

try:
    from diffusers import DiffusionPipeline, ImagePipelineOutput
except ImportError as error:  # in `try`: else transformers asks for diffusers when it opens the repository
    raise ImportError('IsicVQPipeline needs diffusers: pip install "isic-vq[diffusers]"') from error


class IsicVQPipeline(DiffusionPipeline):
    """Generate images: code grids from the prior, decoded by the tokenizer.

    Examples:
        >>> from isic_vq import IsicVQPipeline
        >>> pipe = IsicVQPipeline.from_pretrained("model_cards/isic-vq-128")  # doctest: +SKIP
        >>> images = pipe("melanoma", num_images=4, seed=0).images  # doctest: +SKIP
    """

    model_cpu_offload_seq = "prior->vqvae"

    def __init__(self, vqvae: PreTrainedModel, prior: PreTrainedModel, license: str | None = None):
        super().__init__()
        self.register_modules(vqvae=vqvae, prior=prior)
        self.register_to_config(license=license)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "IsicVQPipeline":
        """Open a folder or a Hub repository; with the package installed none of the repository's code runs.

        Args:
            pretrained_model_name_or_path: a folder or a Hub id.
            kwargs: those of `IsicVQModel.from_pretrained` (`revision`, `dtype`, `token`, `cache_dir`, ...), and
                `vqvae` or `prior` to take that part from elsewhere. `dtype` may be a dictionary with the keys "vqvae",
                "prior" and "default".

        Raises:
            OSError, ValueError: as `IsicVQModel.from_pretrained` does.
        """
        if __name__.startswith("diffusers_modules."):  # without the package
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        kwargs.pop("trust_remote_code", None)
        parts = {name: kwargs.pop(name) for name in ("vqvae", "prior") if name in kwargs}
        dtypes = kwargs.pop("dtype", None)
        if not isinstance(dtypes, dict):
            dtypes = {"default": dtypes}
        for name in dtypes.keys() - {"vqvae", "prior", "default"}:
            raise ValueError(f"dtype names a part {name!r}: expected 'vqvae', 'prior' or 'default'")
        model_class = import_module(".modeling_isic_vq", __package__).IsicVQModel
        default = dtypes.get("default", torch.float32)
        model = model_class.from_pretrained(pretrained_model_name_or_path, dtype=default, **kwargs)
        for name in {"vqvae", "prior"} & dtypes.keys() - parts.keys():
            part_class = type(getattr(model, name))
            parts[name] = part_class.from_pretrained(
                pretrained_model_name_or_path, subfolder=name, dtype=dtypes[name], **kwargs
            )
        pipe = cls(**{"vqvae": model.vqvae, "prior": model.prior, **parts}, license=model.config.license)
        pipe.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipe

    @property
    def model(self) -> Any:
        """The whole `IsicVQModel`, made of the parts that the pipeline holds now."""
        code = type(self.vqvae).__module__.rpartition(".")[0]
        model_class = import_module(".modeling_isic_vq", code).IsicVQModel
        return model_class.from_parts(self.vqvae, self.prior, self.config.license)

    @torch.no_grad()
    def __call__(
        self,
        labels: int | str | Sequence[int | str] | None = None,
        num_images: int | None = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        batch_size: int = 16,
        callback_on_step_end: Callable[[Any, int, int, dict], Any] | None = None,
        **settings: Any,
    ) -> Any:
        """Generate `num_images` images; a step is a row of codes of a block of images.

        Args:
            labels: a diagnosis (name, alias or id) for all images, one per image, or None for unconditional.
            num_images: how many; by default one per label.
            seed: makes image i a function of (seed, i); random without seed and generator.
            generator: one for all images, or one per image, instead of a seed.
            guidance_scale: 1 is off, larger values follow the label more closely; by default as the prior says (`config.sampling`).
            output_type: "pil", "np" (float `(N, H, W, 3)` in [0, 1]), "pt" (float `(N, 3, H, W)` in [0, 1]) or
                "latent" (the codes, int64 `(N, h, w)`).
            return_dict: False returns the tuple `(images,)`.
            batch_size: images computed at once.
            callback_on_step_end: called as `(pipeline, step, step, {})` after each step, counted from 0.
            settings: the other fields of `Sampling` (`temperature`, `top_k`, `top_p`, `guidance_power`), `cluster`
                and `backend`, as for `IsicVQModel.generate`.

        Raises:
            ValueError: an argument outside its range, an unknown label, or both seed and generator.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is {output_type!r}: expected 'pil', 'np', 'pt' or 'latent'")
        model = self.model
        if num_images is None:
            num_images = len(labels) if np.ndim(labels) else 1  # type: ignore[arg-type]
        if guidance_scale is not None:
            settings["guidance_scale"] = guidance_scale
        how = {"seed": seed, "generator": generator, "batch_size": batch_size, **settings}
        total = model.num_steps(num_images, max(batch_size, 1))
        steps = count()  # a bar that is not shown does not count
        with self.progress_bar(total=total) as bar:

            def on_step() -> None:
                step = next(steps)
                if callback_on_step_end is not None:
                    callback_on_step_end(self, step, step, {})
                bar.update()

            output = model.generate(num_images, labels, on_step=on_step, **how)
        images = output.codes if output_type == "latent" else output.pixel_values
        if output_type in ("pil", "np"):
            images = images.float().permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save as `IsicVQModel.save_pretrained` does: a folder that every library opens."""
        self.model.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Push as `IsicVQModel.push_to_hub` does."""
        return self.model.push_to_hub(repo_id, **kwargs)
