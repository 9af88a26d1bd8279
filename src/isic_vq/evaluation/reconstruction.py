"""How well a tokenizer reconstructs images it has not seen, and how it uses its codebook.

PSNR is 10 log10(1 / MSE) per image, SSIM is Wang et al. 2004 with an 11-pixel Gaussian window (sigma 1.5)
on pixel values in [0, 1], computed by torchmetrics at every pixel with the border mirrored (scikit-image leaves
the outermost 5 pixels out: about 0.001 apart); both are averaged over images. MS-SSIM is Wang et al. 2003 with the
first four of its five scales, their weights scaled to sum to 1: the fifth would need 161 pixels. Perplexity and usage
are taken over all codes of the data set, not per batch, where they would depend on the batch size.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from isic_vq.evaluation.intervals import mean_metric
from isic_vq.evaluation.report import Metric
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.models.vector_quantizer import usage_and_perplexity

UNITS = {
    "psnr": "dB",
    "ssim": "1",
    "ms_ssim": "1",
    "lpips": "1",
    "l1": "pixel value in [0, 1]",
    "mse": "squared pixel value in [0, 1]",
}
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363)
MS_SSIM_MIN_SIZE = 99  # pixels: what torchmetrics demands of four scales with an 11-pixel window


@dataclass(frozen=True)
class Reconstruction:
    """How every image came back, and which codes were used.

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
        """How many images were measured."""
        return len(self.values["psnr"])

    @property
    def psnr(self) -> float:
        """Mean over images, in dB."""
        return self.values["psnr"].mean().item()

    @property
    def ssim(self) -> float:
        """Mean over images."""
        return self.values["ssim"].mean().item()

    @property
    def l1(self) -> float:
        """Mean absolute error."""
        return self.values["l1"].mean().item()

    @property
    def mse(self) -> float:
        """Mean squared error."""
        return self.values["mse"].mean().item()


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, one value per image `(B,)`, of images `(B, 3, H, W)` in [0, 1]."""
    return -10 * torch.log10((images - reconstructions).square().mean(dim=(1, 2, 3)))


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity `(B,)`, in [-1, 1], of images `(B, 3, H, W)` in [0, 1]."""
    values = structural_similarity_index_measure(reconstructions, images, data_range=1.0, reduction="none")
    return cast(Tensor, values).reshape(-1)


def ms_ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Multi-scale structural similarity `(B,)` of images `(B, 3, H, W)` in [0, 1], of `MS_SSIM_MIN_SIZE` pixels or more."""
    total = sum(MS_SSIM_WEIGHTS)
    values = multiscale_structural_similarity_index_measure(
        reconstructions,
        images,
        data_range=1.0,
        reduction="none",
        betas=tuple(weight / total for weight in MS_SSIM_WEIGHTS),
    )
    return values.reshape(-1)


def image_metrics(images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
    """PSNR, SSIM, mean absolute and mean squared error, `(B,)` each, of images `(B, 3, H, W)` in [0, 1]."""
    difference = images - reconstructions
    return {
        "psnr": psnr(images, reconstructions),
        "ssim": ssim(images, reconstructions),
        "l1": difference.abs().mean(dim=(1, 2, 3)),
        "mse": difference.square().mean(dim=(1, 2, 3)),
    }


@torch.inference_mode()
def evaluate_reconstruction(model: VQVAEModel, batches: Iterable[Tensor]) -> Reconstruction:
    """Reconstruct every image of `batches` (`(B, 3, H, W)` in [0, 1]) through its codes and measure it.

    The model is put into eval mode and left there.

    Raises:
        ValueError: there are no images.
    """
    model.eval()
    counts = torch.zeros(model.config.num_codes, dtype=torch.long)
    parts: list[dict[str, Tensor]] = []
    for batch in batches:
        images = batch.to(model.device)
        codes = model.encode(images)
        counts += torch.bincount(codes.flatten(), minlength=len(counts)).cpu()
        parts.append(image_metrics(images, model.decode(codes).float()))
    if not parts:
        raise ValueError("there are no images to reconstruct")
    usage, perplexity = usage_and_perplexity(counts)
    return Reconstruction(
        values={name: torch.cat([part[name] for part in parts]).double().cpu() for name in parts[0]},
        usage=usage,
        perplexity=perplexity,
        codebook_counts=counts.tolist(),
    )


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalizes by each batch's own statistics for a block; the running ones are left as they are."""
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
    """PSNR `(N,)` in dB of images as training sees them: with the statistics of their own batch, all else in eval mode.

    Args:
        model: with BatchNorm; it is put into eval mode and left there.
        batches: images `(B, 3, H, W)` in [0, 1]; how many are in a batch matters.
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


def reconstruction_metrics(result: Reconstruction, split: str, dataset: str) -> list[Metric]:
    """The report's lines for a reconstruction measurement."""
    means = [mean_metric(name, values, UNITS[name], split, dataset) for name, values in result.values.items()]
    of_codes = {"usage": (result.usage, "share of codes"), "perplexity": (result.perplexity, "codes")}
    return means + [
        Metric(name, value, unit, result.num_images, split, dataset)
        for name, (value, unit) in of_codes.items()
    ]
