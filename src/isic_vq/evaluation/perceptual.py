"""LPIPS, a distance of images in the features of a network that was trained on photographs.

Source: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", arXiv 1801.03924;
AlexNet, as torchmetrics has it. Its network comes from torchvision, which downloads the weights once: the extra
`lpips`. Photographs are not dermoscopy, so it stands beside the other measures and replaces none.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class PerceptualDistance:
    """LPIPS of pairs of images.

    Raises:
        ValueError: torchvision is not installed, or the weights cannot be had.
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
    """Let `torch.load` read tensors and no other objects, whoever calls it: the weights come as a pickle."""
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
