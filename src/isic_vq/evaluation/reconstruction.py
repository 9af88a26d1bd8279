"""How well a tokenizer reconstructs images it has not seen, and how it uses its codebook.

PSNR is 10 log10(1 / MSE) per image, SSIM is Wang et al. 2004 with an 11-pixel Gaussian window (sigma 1.5)
on pixel values in [0, 1], computed by torchmetrics at every pixel with the border mirrored (scikit-image leaves
the outermost 5 pixels out: about 0.001 apart); both are averaged over images. Perplexity and usage are taken
over all codes of the data set, not per batch, where they would depend on the batch size.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from isic_vq.evaluation.report import Metric
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.models.vector_quantizer import usage_and_perplexity


@dataclass(frozen=True)
class Reconstruction:
    """Means over images.

    Attributes:
        num_images: how many images were measured.
        psnr: dB.
        ssim: in [-1, 1].
        l1: mean absolute error, pixel values in [0, 1].
        mse: mean squared error, pixel values in [0, 1].
        usage: share of the K codes used at least once.
        perplexity: exp(entropy) of code use, in [1, K].
        codebook_counts: uses of each code, K integers.
    """

    num_images: int
    psnr: float
    ssim: float
    l1: float
    mse: float
    usage: float
    perplexity: float
    codebook_counts: list[int]


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, one value per image `(B,)`, of images `(B, 3, H, W)` in [0, 1]."""
    return -10 * torch.log10((images - reconstructions).square().mean(dim=(1, 2, 3)))


@torch.inference_mode()
def evaluate_reconstruction(model: VQVAEModel, batches: Iterable[Tensor]) -> Reconstruction:
    """Reconstruct every image of `batches` (`(B, 3, H, W)` in [0, 1]) through its codes and measure it.

    The model is put into eval mode and left there.

    Raises:
        ValueError: there are no images.
    """
    model.eval()
    counts = torch.zeros(model.config.num_codes, dtype=torch.long)
    columns: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "l1": [], "mse": []}
    for batch in batches:
        images = batch.to(model.device)
        codes = model.encode(images)
        reconstructions = model.decode(codes).float()
        counts += torch.bincount(codes.flatten(), minlength=len(counts)).cpu()
        difference = images - reconstructions
        columns["psnr"].append(psnr(images, reconstructions))
        similarity = structural_similarity_index_measure(
            reconstructions, images, data_range=1.0, reduction="none"
        )
        columns["ssim"].append(similarity.reshape(-1))  # type: ignore[union-attr]  # one tensor by default
        columns["l1"].append(difference.abs().mean(dim=(1, 2, 3)))
        columns["mse"].append(difference.square().mean(dim=(1, 2, 3)))
    if not columns["psnr"]:
        raise ValueError("there are no images to reconstruct")
    usage, perplexity = usage_and_perplexity(counts)
    means = {name: torch.cat(values).double().mean().item() for name, values in columns.items()}
    return Reconstruction(
        num_images=sum(len(values) for values in columns["psnr"]),
        usage=usage,
        perplexity=perplexity,
        codebook_counts=counts.tolist(),
        **means,
    )


def reconstruction_metrics(result: Reconstruction, split: str, dataset: str) -> list[Metric]:
    """The report's lines for a reconstruction measurement."""
    units = {"psnr": "dB", "ssim": "1", "l1": "pixel value in [0, 1]", "mse": "squared pixel value in [0, 1]"}
    units |= {"usage": "share of codes", "perplexity": "codes"}
    return [
        Metric(name, float(getattr(result, name)), unit, result.num_images, split, dataset)
        for name, unit in units.items()
    ]
