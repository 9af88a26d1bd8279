"""Measures of images, predictions and scores, each defined once.

PSNR is 10 log10(1 / MSE) per image. SSIM is Wang et al. 2004 with an 11-pixel Gaussian window (sigma 1.5) on pixel values
in [0, 1], computed by torchmetrics at every pixel with the border mirrored (scikit-image leaves the outermost 5 pixels
out: about 0.001 apart). MS-SSIM is Wang et al. 2003 with the first four of its five scales, their weights scaled to sum
to 1: the fifth would need 161 pixels. LPIPS is Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric", arXiv 1801.03924, of AlexNet by torchmetrics: a network trained on photographs, which are not dermoscopy images.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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

Measure = Callable[[Tensor, Tensor], float]  # of logits `(N, C)` and labels `(N,)`


def psnr(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, one value per image `(B,)`, of images `(B, 3, H, W)` in [0, 1]."""
    return -10 * torch.log10((images - reconstructions).square().mean(dim=(1, 2, 3)))


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity `(B,)`, in [-1, 1], of images `(B, 3, H, W)` in [0, 1]."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    values = structural_similarity_index_measure(reconstructions, images, data_range=1.0, reduction="none")
    return cast(Tensor, values).reshape(-1)


def ms_ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Multi-scale SSIM `(B,)` of images `(B, 3, H, W)` in [0, 1], of `MS_SSIM_MIN_SIZE` pixels or more."""
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    weights = tuple(weight / sum(MS_SSIM_WEIGHTS) for weight in MS_SSIM_WEIGHTS)
    return multiscale_structural_similarity_index_measure(
        reconstructions, images, data_range=1.0, reduction="none", betas=weights
    ).reshape(-1)


def image_metrics(images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
    """PSNR, SSIM, mean absolute and mean squared error, `(B,)` each, of images `(B, 3, H, W)` in [0, 1]."""
    difference = images - reconstructions
    return {
        "psnr": psnr(images, reconstructions),
        "ssim": ssim(images, reconstructions),
        "l1": difference.abs().mean(dim=(1, 2, 3)),
        "mse": difference.square().mean(dim=(1, 2, 3)),
    }


def code_counts(codes: Tensor, num_codes: int) -> Tensor:
    """How often each image uses each code: `(N, K)` int64 of codes `(N, ...)`."""
    flat = codes.flatten(1)
    return flat.new_zeros(len(flat), num_codes).scatter_add(1, flat, torch.ones_like(flat))


def auroc(usual: Tensor, unusual: Tensor) -> float:
    """Area under the ROC curve, in [0, 1], of scores `(N,)` and `(M,)` that should be higher for the unusual.

    It is the probability that an unusual one scores higher than a usual one, ties counting half; 0.5 is chance.
    """
    from scipy.stats import rankdata

    ranks = rankdata(torch.cat([usual, unusual]).numpy())[len(usual) :]
    # The area is Mann and Whitney's U: how many pairs of one of each are in the right order, ties counting half.
    pairs = ranks.sum() - len(unusual) * (len(unusual) + 1) / 2
    return float(pairs / (len(usual) * len(unusual)))


def balanced_accuracy(labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Mean, over the classes that occur in `labels`, of the share of each that is predicted as itself."""
    return float(np.mean([(predicted[labels == label] == label).mean() for label in np.unique(labels)]))


def classifier_measures(classes: Sequence[str], labels: Tensor) -> dict[tuple[str, str | None], Measure]:
    """Measures in [0, 1] of a classifier's predictions for images with these labels `(N,)`.

    Returns:
        By name and class: `("accuracy", None)`; `("balanced_accuracy", None)`, the mean recall of the classes that occur;
        `("auc", CLASS)`, the area under the ROC curve of a class's probability against all others, of each class that
        occurs beside others.
    """
    measures: dict[tuple[str, str | None], Measure] = {
        ("accuracy", None): lambda logits, labels: (logits.argmax(1) == labels).double().mean().item(),
        ("balanced_accuracy", None): lambda logits, labels: balanced_accuracy(
            labels.numpy(), logits.argmax(1).numpy()
        ),
    }
    for index, name in enumerate(classes):
        if 0 < (labels == index).sum() < len(labels):
            measures["auc", name] = partial(_one_against_others, index)
    return measures


def _one_against_others(index: int, logits: Tensor, labels: Tensor) -> float:
    probabilities, positive = logits.softmax(1)[:, index], labels == index
    return auroc(probabilities[~positive], probabilities[positive])


class PerceptualDistance:
    """LPIPS of pairs of images; torchvision, of the extra `lpips`, downloads the weights once.

    Raises:
        ValueError: torchvision is not installed, or the weights cannot be downloaded.
    """

    def __init__(self, device: torch.device) -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            with _tensors_alone():
                network = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        except ModuleNotFoundError as error:
            raise ValueError("LPIPS needs torchvision: pip install 'isic-vq[lpips]'") from error
        except OSError as error:
            raise ValueError(
                f"LPIPS needs AlexNet's weights, which torchvision could not download ({error}): leave --lpips out, "
                "or put the file into TORCH_HOME/hub/checkpoints"
            ) from error
        self.network = network.to(device).eval()

    @torch.inference_mode()
    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        """Distance of each pair of images `(B, 3, H, W)` in [0, 1], `(B,)` on the CPU, at least 0."""
        # One pair at a time: the metric gives the mean of those that it is given.
        pairs = zip(images.split(1), others.clamp(0, 1).split(1), strict=True)
        return torch.stack([self.network(image, other).cpu() for image, other in pairs])


@contextmanager
def _tensors_alone() -> Iterator[None]:
    """Let `torch.load`, which torchvision calls on a pickle, read tensors and no other objects."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
