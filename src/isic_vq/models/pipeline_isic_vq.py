"""transformers pipeline for the task "unconditional-image-generation": labels in, PIL images out.

It chains sampling of code grids from the prior and decoding by the tokenizer; image i depends on (seed, i) alone.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from tqdm import tqdm
from transformers import Pipeline

from .configuration_isic_vq import IsicVQConfig
from .image_processing_isic_vq import IsicVQImageProcessor
from .modeling_isic_vq import BLOCK_SIZE
from .sampling import Sampling, num_labelled

SETTINGS = (*(field.name for field in fields(Sampling)), "sampling", "cluster", "backend")


class UnconditionalImageGenerationPipeline(Pipeline):
    """Generate images from a composite model.

    Examples:
        >>> from transformers import pipeline
        >>> import isic_vq
        >>> pipe = pipeline("unconditional-image-generation", model="model_cards/isic-vq-128")  # doctest: +SKIP
        >>> images = pipe(num_images=8, seed=0)  # doctest: +SKIP
        >>> images = pipe("melanoma", num_images=4, guidance_scale=1.5)  # doctest: +SKIP
    """

    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    _pipeline_calls_generate = False

    def __init__(self, *args: Any, **kwargs: Any):
        """Take what transformers' `pipeline` gives; ValueError for a model that is not a composite."""
        super().__init__(*args, **kwargs)
        kind = self.model.config.model_type
        if kind != IsicVQConfig.model_type:
            raise ValueError(
                f"the model is an {kind}: generating needs a tokenizer and a prior in one {IsicVQConfig.model_type}. Name the "
                "folder of a whole model, such as that of a trained prior, or join the two with IsicVQModel.from_parts"
            )

    def __call__(
        self,
        labels: int | str | Sequence[int | str] | None = None,
        *,
        num_images: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        return_codes: bool = False,
        progress: bool = False,
        **settings: Any,
    ) -> Any:
        """Generate `num_images` images.

        Args:
            labels: a diagnosis (name, alias or id) for all images, one per image, or None for unconditional.
            num_images: how many; by default one per label.
            seed: makes image i a function of (seed, i); random without seed and generator.
            generator: one for all images, or one per image, instead of a seed.
            batch_size: images computed at once; 16 unless the pipeline was built with another.
            output_type: "pil" for a list of PIL images, "np" for uint8 `(N, H, W, 3)`, "pt" for float
                `(N, 3, H, W)` in [0, 1].
            return_codes: return a dictionary of `images`, `codes` (int64 `(N, h, w)`), `labels` and, of a prior with
                clusters, `clusters`.
            progress: show a progress bar.
            settings: the fields of `Sampling` (`temperature`, `top_k`, `top_p`, `guidance_scale`, `guidance_power`), `cluster` and
                `backend`, as for `IsicVQModel.generate`. Given to `pipeline(...)` they become its defaults.

        Raises:
            TypeError: an argument that is none of these.
            ValueError: an argument outside its range, or an unknown label.
        """
        if num_images is None:
            num_images = num_labelled(labels)
        batch_size = self._batch_size or BLOCK_SIZE if batch_size is None else batch_size
        inputs = {
            "num_images": num_images,
            "labels": labels,
            "seed": seed,
            "generator": generator,
            "batch_size": batch_size,
        }
        steps = self.model.num_steps(num_images, max(batch_size, 1))
        with tqdm(total=steps, disable=not progress, unit="step", desc="sampling") as bar:
            result = super().__call__(inputs, on_step=bar.update, **settings)
        processor = IsicVQImageProcessor(size=self.model.config.vqvae_config.image_size)
        images = processor.postprocess(result.pop("pixel_values"), output_type=output_type)
        return {"images": images, **result} if return_codes else images

    def _sanitize_parameters(self, **settings: Any) -> tuple[dict, dict, dict]:
        for name in settings.keys() - {*SETTINGS, "on_step"}:
            raise TypeError(
                f"{type(self).__name__} got an unexpected argument {name!r}: beside those of its call it takes "
                f"{', '.join(SETTINGS)}"
            )
        return {}, settings, {}

    def preprocess(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Pass labels, seed and numbers on."""
        return inputs

    def _forward(self, model_inputs: dict[str, Any], **settings: Any) -> Any:
        return self.model.generate(**model_inputs, **settings)

    def postprocess(self, model_outputs: Any) -> Any:
        """Return the tensors as a dictionary; images are made of them at the end."""
        return dict(model_outputs)
