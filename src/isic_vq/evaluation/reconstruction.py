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
    """Measures of every reconstructed image, whose means are properties, and of the codes.

    Attributes:
        values: `(N,)` float64 by name, for each image: `psnr` (dB), `ssim` (in [-1, 1]), `l1` and `mse` (of pixel
            values in [0, 1]).
        usage: share of the K codes used at least once.
        perplexity: exp(entropy) of code use, in [1, K].
        codebook_counts: uses of each code, K integers.
    """

    values: dict[str, Tensor]
    usage: float
    perplexity: float
    codebook_counts: list[int]

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
    """Reconstruct every image through its codes and measure it.

    Args:
        model: put into eval mode and left there.
        batches: images `(B, 3, H, W)` in [0, 1].
        on_batch: called with the images, codes and reconstructions of each batch, for further measures.

    Raises:
        ValueError: there are no images.
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
    """PSNR `(N,)` in dB with BatchNorm as in training, by the statistics of each batch, and all else in eval mode.

    Args:
        model: with BatchNorm; it is put into eval mode and left there.
        batches: images `(B, 3, H, W)` in [0, 1]; the batch size matters.
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
