"""What the page's buttons do, without the page: numbers of a form in, pictures out.

Everything comes from the model's own `generate`, `encode`, `decode`, `score` and `inpaint`; nothing is computed in
another way here. Bad input is a ValueError whose text can be shown as it is.
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
from isic_vq.demo.training_index import Neighbour, TrainingIndex
from isic_vq.evaluation.measures import psnr
from isic_vq.figures.numbers import CodebookUse
from isic_vq.hub.pretrained import is_default
from isic_vq.models.editing import code_masks, pixel_mask
from isic_vq.models.image_processing_isic_vq import ImageError, IsicVQImageProcessor
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.sampling import Sampling

ANY = "any"  # in place of a diagnosis: unconditional
Pictures = list[tuple[Image.Image, str]]


@dataclass(frozen=True)
class Generated:
    """Images made by `DemoModel.generate`.

    Attributes:
        codes: `(B, h, w)` int64.
    """

    images: list[Image.Image]
    captions: list[str]
    codes: Tensor
    command: str


@dataclass(frozen=True)
class Explained:
    """What the tokenizer makes of an image.

    Attributes:
        psnr: dB.
        bits_per_code: under the prior, without a diagnosis.
    """

    reconstruction: Image.Image
    code_map: Image.Image
    surprise: Image.Image
    use: CodebookUse
    psnr: float
    bits_per_code: float

    def table(self) -> str:
        """The numbers as a table in HTML."""
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
    """A diagnosis as people write it."""
    return diagnosis.replace("_", " ")


def checked_seed(seed: int | None) -> int:
    """A seed as the page's field gives it; an empty field is None.

    Raises:
        ValueError: the field is empty.
    """
    if seed is None:
        raise ValueError("the seed is empty: expected a whole number of at least 0")
    return int(seed)


def chosen(square: Image.Image | None) -> Image.Image:
    """An image, if somebody chose one.

    Raises:
        ValueError: nobody did.
    """
    if square is None:
        raise ValueError("there is no image yet: choose one first")
    return square


def made_before(generated: Generated | None) -> Generated:
    """Generated images, if there are any.

    Raises:
        ValueError: there are none.
    """
    if generated is None:
        raise ValueError("there is no generated image yet: generate one first")
    return generated


class DemoModel:
    """A model as the page uses it."""

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
        """The centred square of an image file, of the model's size: what the model sees.

        Raises:
            ImageError: the file is no image, damaged or too small; it is called by its name alone.
        """
        name = Path(path).name
        try:
            return Image.fromarray(self.processor.to_square(path, name))
        except ImageError as error:
            raise ImageError(str(error).replace(path, name)) from error  # Pillow's part tells the folder

    def pixel_values(self, square: Image.Image) -> Tensor:
        """`(1, 3, H, W)` in [0, 1], on the model's device."""
        return self.processor(square, return_tensors="pt")["pixel_values"].to(self.model.device)

    def encode(self, square: Image.Image) -> Tensor:
        """Codes `(h, w)` of an image."""
        return self.model.encode(self.pixel_values(square))[0]

    def decode(self, codes: Sequence[Tensor]) -> list[Image.Image]:
        """Images of grids of codes `(h, w)`."""
        return self.processor.postprocess(self.model.decode(torch.stack(list(codes)).to(self.model.device)))

    def generate(
        self,
        diagnosis: str,
        num_images: int,
        seed: int | None,
        sampling: Sampling | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Generated:
        """Generate images; those of a seed are those of `IsicVQModel.generate` and `isic-vq generate`.

        Args:
            diagnosis: a class of the model, or `ANY`.
            num_images: at least 1.
            seed: image i depends on (seed, i) alone.
            sampling: how codes are drawn; by default from the prior's own distribution.
            on_step: as in `IsicVQModel.generate`.

        Raises:
            ValueError: an empty seed, or what `IsicVQModel.generate` refuses.
        """
        seed, sampling = checked_seed(seed), sampling or Sampling()
        label = None if diagnosis == ANY else diagnosis
        output: Any = self.model.generate(
            int(num_images), label, seed=seed, sampling=sampling, on_step=on_step
        )
        source = self.model.config.name_or_path
        options = {} if not source or is_default(source) else {"--model": source}
        options |= {"-n": num_images} | ({"--label": label} if label else {}) | {"--seed": seed}
        options |= {f"--{name.replace('_', '-')}": value for name, value in sampling.changes.items()}
        words = ["isic-vq", "generate", *(str(word) for option in options.items() for word in option)]
        name = readable(label or "any diagnosis")
        return Generated(
            images=self.processor.postprocess(output.pixel_values),
            captions=[f"{name}, seed {seed}, image {index}" for index in range(int(num_images))],
            codes=output.codes.cpu(),
            command=shlex.join(words),
        )

    def explain(self, square: Image.Image | None) -> Explained:
        """Send an image through the tokenizer and back, and say what it took.

        Raises:
            ValueError: there is no image.
        """
        original = self.pixel_values(chosen(square))
        scores: Any = self.model.score(original)
        reconstruction = self.model.decode(scores.codes)
        codes = scores.codes[0].cpu().numpy()
        finest = self.model.vqvae.code_grids(scores.codes)[-1][0].cpu().numpy()
        return Explained(
            reconstruction=self.processor.postprocess(reconstruction)[0],
            code_map=Image.fromarray(code_map(finest, self.colors)),
            surprise=Image.fromarray(bits_map(scores.bits_map[0].numpy(), self.num_codes)),
            use=CodebookUse.of(codes, self.num_codes),
            psnr=psnr(original, reconstruction).item(),
            bits_per_code=scores.bits_per_code.item(),
        )

    def box_mask(self, left: int, top: int, right: int, bottom: int) -> NDArray[np.bool_]:
        """The pixels `(H, W)` of a box, given by its edges in pixels.

        Raises:
            ValueError: the box is empty.
        """
        if not (left < right and top < bottom):
            raise ValueError(
                f"the box from ({left}, {top}) to ({right}, {bottom}) is empty: expected left below right and top "
                "below bottom"
            )
        mask = np.zeros((self.size, self.size), dtype=bool)
        mask[top:bottom, left:right] = True
        return mask

    def painted_mask(self, layers: Sequence[Image.Image]) -> NDArray[np.bool_]:
        """The pixels `(H, W)` that are painted on any of some layers, which are transparent elsewhere.

        Raises:
            ValueError: nothing is painted.
        """
        masks = [self.processor.to_mask(layer.convert("RGBA").getchannel("A")) for layer in layers]
        if not any(mask.any() for mask in masks):
            raise ValueError("nothing is painted: brush over what is to be drawn anew")
        return np.logical_or.reduce(masks)

    def region(self, square: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
        """The image with all patches that a mask touches tinted: what will be drawn anew."""
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
        """The image, its marked region, and variants of it with the region drawn anew; see `IsicVQModel.inpaint`.

        Raises:
            ValueError: no image, an empty seed, or what `IsicVQModel.inpaint` refuses.
        """
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
        before = [(square, "original"), (self.region(square, mask), "drawn anew")]
        return [*before, *zip(variants, captions, strict=True)]

    def neighbours(self, codes: Tensor, index: TrainingIndex, count: int) -> Pictures:
        """An image and the training images nearest to it, all as their codes decode, nearest first."""
        found = index.nearest(codes, int(count))
        images = self.decode([codes.cpu(), *(neighbour.codes for neighbour in found)])
        captions = ["your image, as its codes decode", *(self._caption(neighbour) for neighbour in found)]
        return list(zip(images, captions, strict=True))

    def _caption(self, neighbour: Neighbour) -> str:
        share = neighbour.num_equal / neighbour.codes.numel()
        return (
            f"{neighbour.isic_id}, {readable(neighbour.diagnosis)}: distance {neighbour.distance:.2f}, "
            f"{share:.0%} equal codes"
        )
