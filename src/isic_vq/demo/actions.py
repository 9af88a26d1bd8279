"""The actions of the page's buttons, without gradio: values of a form in, pictures out.

They call the model's `generate`, `encode`, `decode`, `score` and `inpaint`. Bad input is a ValueError whose text the page
shows.
"""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from isic_vq.demo.code_maps import bits_map, code_colors, code_map, overlay
from isic_vq.demo.training_index import TrainingIndex
from isic_vq.evaluation.measures import psnr
from isic_vq.figures.numbers import CodebookUse
from isic_vq.hub.pretrained import is_default
from isic_vq.models.editing import code_masks, pixel_mask
from isic_vq.models.image_processing_isic_vq import ImageError, IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.sampling import Sampling

ANY = "any"  # the value of the diagnosis field for unconditional images
MAX_IMAGES = 16  # of one seed; computed as one block
Pictures = list[tuple[Image.Image, str]]


@dataclass(frozen=True)
class Generated:
    """Images of `DemoModel.generate` with their codes `(B, h, w)` int64."""

    images: list[Image.Image]
    captions: list[str]
    codes: Tensor
    command: str


@dataclass(frozen=True)
class Explained:
    """An image as the tokenizer reconstructs it; `psnr` is in dB, `bits_per_code` under the unconditional prior."""

    reconstruction: Image.Image
    code_map: Image.Image
    surprise: Image.Image
    use: CodebookUse
    psnr: float
    bits_per_code: float

    def table(self) -> str:
        """Render the numbers as a table in HTML."""
        num_codes = len(self.use.counts)
        facts = {
            "PSNR of the reconstruction": f"{self.psnr:.2f} dB",
            "Bits per code under the prior": f"{self.bits_per_code:.2f} of {math.log2(num_codes):.2f}",
            "Codes in use": f"{self.use.num_used} of {num_codes}",
            "Perplexity of their use": f"{self.use.perplexity:.1f}",
        }
        rows = [f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in facts.items()]
        return f'<table class="facts">{"".join(rows)}</table>'


def readable(diagnosis: str) -> str:
    """Write a diagnosis with blanks."""
    return diagnosis.replace("_", " ")


def checked_seed(seed: int | None) -> int:
    """Convert the value of the seed field; ValueError if it is empty (None)."""
    if seed is None:
        raise ValueError("the seed is empty: expected a whole number of at least 0")
    return int(seed)


def chosen(square: Image.Image | None) -> Image.Image:
    """Return the image; ValueError if none was chosen yet."""
    if square is None:
        raise ValueError("there is no image yet: choose one first")
    return square


def made_before(generated: Generated | None) -> Generated:
    """Return the generated images; ValueError if there are none yet."""
    if generated is None:
        raise ValueError("there is no generated image yet: generate one first")
    return generated


class DemoModel:
    """A model with the actions of the page."""

    def __init__(self, model: IsicVQModel):
        self.model = model
        config = model.config.vqvae_config
        self.size, self.step, self.num_codes = config.image_size, config.downsampling, config.num_codes
        self.num_steps = model.config.prior_config.num_steps
        self.diagnoses = list(model.config.class_names.values())
        self.processor = IsicVQImageProcessor(size=self.size)
        alone = model.vqvae.decode_alone(torch.arange(self.num_codes, device=model.device))
        codebook = model.vqvae.quantizer.codebook.detach()
        self.colors = code_colors(codebook.cpu().numpy(), alone.mean(dim=(1, 2, 3)).cpu().numpy())

    def read_square(self, path: str) -> Image.Image:
        """Read the centred square of an image file at the model's size; ImageError, without the folder, if unusable."""
        name = Path(path).name
        try:
            return Image.fromarray(self.processor.to_square(path, name))
        except ImageError as error:
            raise ImageError(str(error).replace(path, name)) from error  # Pillow's message holds the folder

    def pixel_values(self, square: Image.Image) -> Tensor:
        """Convert an image to `(1, 3, H, W)` in [0, 1] on the model's device."""
        return self.processor(square, return_tensors="pt")["pixel_values"].to(self.model.device)

    def encode(self, square: Image.Image) -> Tensor:
        """Encode an image to codes `(h, w)`."""
        return self.model.encode(self.pixel_values(square))[0]

    def decode(self, codes: Sequence[Tensor]) -> list[Image.Image]:
        """Decode grids of codes `(h, w)`."""
        return self.processor.postprocess(self.model.decode(torch.stack(list(codes)).to(self.model.device)))

    def generate(
        self,
        diagnosis: str | Sequence[str],
        num_images: int,
        seed: int | None,
        sampling: Sampling | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Generated:
        """Generate the same images as `IsicVQModel.generate` and `isic-vq generate` with this seed.

        `diagnosis` is a class of the model, one per image, or `ANY`; other arguments and errors are as in
        `IsicVQModel.generate`.
        """
        seed, sampling = checked_seed(seed), sampling or self.model.default_sampling
        labels = [] if diagnosis == ANY else [diagnosis] if isinstance(diagnosis, str) else [*diagnosis]
        label = labels if len(labels) > 1 else next(iter(labels), None)
        output: Any = self.model.generate(
            int(num_images), label, seed=seed, sampling=sampling, on_step=on_step
        )
        source = self.model.config.name_or_path
        options = [] if not source or is_default(source) else [("--model", source)]
        options += [("-n", num_images), *(("--label", name) for name in labels), ("--seed", seed)]
        options += [
            (f"--{name.replace('_', '-')}", value)
            for name, value in sampling.changes(self.model.default_sampling).items()
        ]
        words = ["isic-vq", "generate", *(str(word) for option in options for word in option)]
        names = (labels or ["any diagnosis"]) * int(num_images)
        return Generated(
            images=self.processor.postprocess(output.pixel_values),
            captions=[f"{readable(names[i])}, seed {seed}, image {i}" for i in range(int(num_images))],
            codes=output.codes.cpu(),
            command=shlex.join(words),
        )

    def generate_each_class(self) -> Generated:
        """Generate an image of each class (at most `MAX_IMAGES`), or four of a model without classes, with seed 0."""
        shown = self.diagnoses[:MAX_IMAGES]
        return self.generate(shown or ANY, len(shown) or 4, 0)

    def explain(self, square: Image.Image | None) -> Explained:
        """Reconstruct an image, and measure the reconstruction and its codes; ValueError without an image."""
        original = self.pixel_values(chosen(square))
        scores: Any = self.model.score(original)
        reconstruction = self.model.decode(scores.codes)
        codes = scores.codes[0].cpu().numpy()
        finest = self.model.vqvae.code_grids(scores.codes)[-1][0].cpu().numpy()
        return Explained(
            reconstruction=self.processor.postprocess(reconstruction)[0],
            code_map=Image.fromarray(code_map(finest, self.colors)),
            surprise=Image.fromarray(bits_map(scores.bits_map[0].numpy(), self.num_codes)),
            use=CodebookUse.count(codes, self.num_codes),
            psnr=psnr(original, reconstruction).item(),
            bits_per_code=scores.bits_per_code.item(),
        )

    def box_mask(self, left: int, top: int, right: int, bottom: int) -> NDArray[np.bool_]:
        """Make a mask `(H, W)` of a box from its edges in pixels; ValueError if the box is empty."""
        if not (left < right and top < bottom):
            raise ValueError(
                f"the box from ({left}, {top}) to ({right}, {bottom}) is empty: expected left below right and top "
                "below bottom"
            )
        mask = np.zeros((self.size, self.size), dtype=bool)
        mask[top:bottom, left:right] = True
        return mask

    def painted_mask(self, layers: Sequence[Image.Image]) -> NDArray[np.bool_]:
        """Make a mask `(H, W)` of the pixels painted on any layer; ValueError if there are none."""
        masks = [self.processor.to_mask(layer.convert("RGBA").getchannel("A")) for layer in layers]
        if not any(mask.any() for mask in masks):
            raise ValueError("nothing is painted: brush over the region to inpaint")
        return np.logical_or.reduce(masks)

    def region(self, square: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
        """Tint the region to inpaint: all patches that a mask touches."""
        touched = code_masks(torch.from_numpy(mask), 1, self.size, [self.size // self.step])[-1]
        return Image.fromarray(overlay(np.asarray(square), pixel_mask(touched, self.size)[0, 0].numpy()))

    def edit(
        self,
        square: Image.Image | None,
        mask: NDArray[np.bool_],
        diagnosis: str,
        num_variants: int,
        seed: int | None,
        num_particles: int = 64,
        blend: bool = True,
        on_step: Callable[[], Any] | None = None,
    ) -> Pictures:
        """Return the image, its tinted region, and variants with the region inpainted, as `IsicVQModel.inpaint` does."""
        square, seed = chosen(square), checked_seed(seed)
        edited: Any = self.model.inpaint(
            self.pixel_values(square).expand(int(num_variants), -1, -1, -1),
            torch.from_numpy(mask),
            None if diagnosis == ANY else diagnosis,
            seed=seed,
            num_particles=int(num_particles),
            blend="poisson" if blend else "paste",
            on_step=on_step,
        )
        name = readable(diagnosis if diagnosis != ANY else "any diagnosis")
        variants = self.processor.postprocess(edited.pixel_values)
        captions = [f"{name}, seed {seed}, variant {index}" for index in range(len(variants))]
        before = [(square, "original"), (self.region(square, mask), "region")]
        return [*before, *zip(variants, captions, strict=True)]

    def neighbours(self, codes: Tensor, index: TrainingIndex, count: int) -> Pictures:
        """Return an image and its nearest training images, nearest first, all decoded from their codes."""
        nearest = index.nearest(codes, int(count))
        images = self.decode([codes.cpu(), *(neighbour.codes for neighbour in nearest)])
        captions = [
            f"{neighbour.isic_id}, {readable(neighbour.diagnosis)}: distance {neighbour.distance:.2f}, "
            f"{neighbour.num_equal / neighbour.codes.numel():.0%} equal codes"
            for neighbour in nearest
        ]
        return list(zip(images, ["your image, decoded from its codes", *captions], strict=True))
