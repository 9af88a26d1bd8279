"""Reconstruction of images by a tokenizer, and the use of its codebook.

Measures are averaged over images. Perplexity and usage are taken over all codes of the data set: per batch they would depend
on the batch size.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isic_vq.evaluation.intervals import MeasuredOn
from isic_vq.evaluation.measures import UNITS, image_metrics, psnr
from isic_vq.evaluation.report import Metric
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.models.vector_quantizer import usage_and_perplexity


@dataclass(frozen=True)
class Reconstruction:
    """Measures of every reconstructed image, whose means are properties, and of the codes."""

    values: dict[str, Tensor]  # `(N,)` float64 of each image: `psnr` (dB), `ssim`, `l1`, `mse`
    usage: float  # share of the K codes used at least once
    perplexity: float  # exp(entropy) of code use, in [1, K]
    codebook_counts: list[int]  # uses of each code, K integers

    @property
    def num_images(self) -> int:
        return len(self.values["psnr"])

    @property
    def psnr(self) -> float:
        return self.values["psnr"].mean().item()

    @property
    def ssim(self) -> float:
        return self.values["ssim"].mean().item()

    @property
    def l1(self) -> float:
        return self.values["l1"].mean().item()

    @property
    def mse(self) -> float:
        return self.values["mse"].mean().item()


@torch.inference_mode()
def evaluate_reconstruction(
    model: VQVAEModel,
    batches: Iterable[Tensor],
    on_batch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Reconstruction:
    """Reconstruct batches of images `(B, 3, H, W)` in [0, 1] through their codes, and measure them.

    The model is put into eval mode and left there. `on_batch` is called with the images, codes and reconstructions of each batch, for further measures.
    """
    model.eval()
    counts = torch.zeros(model.config.num_codes, dtype=torch.long)
    values: dict[str, list[float]] = {}  # tensors kept between large ones would cut the heap into pieces
    for batch in batches:
        images = batch.to(model.device)
        codes = model.encode(images)
        counts += torch.bincount(codes.flatten(), minlength=len(counts)).cpu()
        decoded = model.decode(codes).float()
        for name, measured in image_metrics(images, decoded).items():
            values.setdefault(name, []).extend(measured.tolist())
        if on_batch is not None:
            on_batch(images, codes, decoded)
    if not values:
        raise ValueError("there are no images to reconstruct: expected at least one")
    usage, perplexity = usage_and_perplexity(counts)
    return Reconstruction(
        values={name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in values.items()},
        usage=usage,
        perplexity=perplexity,
        codebook_counts=counts.tolist(),
    )


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalize by each batch's own statistics in a block; the running ones do not change."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    kept = [(norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm, (training, tracks) in zip(norms, kept, strict=True):
            norm.training, norm.track_running_stats = training, tracks


@torch.no_grad()
def psnr_by_batch_statistics(model: VQVAEModel, batches: Iterable[Tensor]) -> Tensor:
    """PSNR `(N,)` in dB of batches of images `(B, 3, H, W)` in [0, 1], with BatchNorm by each batch's statistics.

    All else is in eval mode, in which the model is left.
    """
    model.eval()
    values = []
    with batch_statistics(model):
        for batch in batches:
            images = batch.to(model.device)
            codes = model.quantizer.encode(model.embed(images))
            decoded = model.decoder(model.quantizer.lookup(codes), model.code_grids(codes)[-1])
            values.append(psnr(images, decoded.float()).cpu())
    return torch.cat(values).double()


def reconstruction_metrics(result: Reconstruction, on: MeasuredOn) -> list[Metric]:
    """The report's lines for a reconstruction measurement."""
    return [
        *(on.mean(name, values, UNITS[name]) for name, values in result.values.items()),
        on.metric("usage", result.usage, "share of codes", result.num_images),
        on.metric("perplexity", result.perplexity, "codes", result.num_images),
    ]
