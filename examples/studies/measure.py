"""Measure the models of a study image by image, once, so that they can be compared image by image."""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from chain import Chain
from isic_vq.data.sources import find_source
from isic_vq.evaluation.bits_per_code import bits_per_code
from isic_vq.evaluation.intervals import mean_interval
from isic_vq.evaluation.measured_images import measure_images
from isic_vq.files import write_atomically
from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel

VALUES = ("psnr", "ssim", "bits_per_code")


def measure_chain(chain: Chain, name: str, uri: str) -> dict[str, Tensor]:
    """PSNR, SSIM and unconditional bits per code of every image of a data set, and how often each code is used.

    Args:
        chain: a finished one.
        name: of the data set.
        uri: of the data set; the values are kept in the chain's folder under both.

    Returns:
        `(N,)` float64 for each of `VALUES`, in the order of the data set, and `codebook_counts`, `(K,)` int64.

    Raises:
        DataError: as `measure_images`.
    """
    path = measured_file(chain, name, uri)
    if not path.is_file():
        model = load_model(IsicVQModel, str(chain.model)).eval()
        measured = measure_images(model, find_source(uri))
        values = {key: measured.reconstruction.values[key] for key in ("psnr", "ssim")}
        values["bits_per_code"] = bits_per_code(model, measured.codes, None)
        values["codebook_counts"] = torch.tensor(measured.reconstruction.codebook_counts)
        write_atomically(path, save(values))
    return load_file(path)


def measured_file(chain: Chain, name: str, uri: str) -> Path:
    """Where a data set's values are kept; another URI is another data set, whatever it is called."""
    return chain.folder / "measured" / f"{name}-{sha256(uri.encode()).hexdigest()[:8]}.safetensors"


@dataclass(frozen=True)
class Difference:
    """How one model's images differ from another's, for each of the seeds.

    Attributes:
        means: of the differences, image by image, for each seed.
    """

    means: list[float]
    intervals: list[tuple[float, float]]

    @property
    def sign(self) -> int:
        """1 or -1 where every one of two seeds or more has its interval on that side of 0, else 0: nothing may be said."""
        if len(self.intervals) < 2:
            return 0
        if all(low > 0 for low, _ in self.intervals):
            return 1
        return -1 if all(high < 0 for _, high in self.intervals) else 0

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return sum(self.means) / len(self.means)

    def change(self, what: str, unit: str = "", digits: int = 2) -> str:
        """In words, where the seeds agree on its sign: "PSNR rises by 0.43 (0.41, 0.45) dB"."""
        if self.sign == 0:
            said = "the seeds do not agree" if len(self.means) > 1 else "one seed decides nothing"
            return f"{said} on {what} ({self.text(digits)})"
        amount = self.text(digits).replace("+", "").replace("-", "")
        return f"{what} {'rises' if self.sign > 0 else 'falls'} by {amount} {unit}".rstrip()

    def text(self, digits: int = 2) -> str:
        """The mean over seeds, and every seed's own in brackets."""
        each = ", ".join(f"{mean:+.{digits}f}" for mean in self.means)
        return f"{self.mean:+.{digits}f} ({each})"


def paired_difference(first: list[Tensor], second: list[Tensor]) -> Difference:
    """Second minus first of values `(N,)` of the same images, image by image, seed by seed."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return Difference([d.mean().item() for d in differences], [mean_interval(d) for d in differences])


def unpaired_difference(first: list[Tensor], second: list[Tensor]) -> Difference:
    """Mean of the second's values `(M,)` minus that of the first's `(N,)`, seed by seed, with Welch's standard error."""
    means, intervals = [], []
    for a, b in zip(first, second, strict=True):
        mean = (b.mean() - a.mean()).item()
        error = (a.var() / len(a) + b.var() / len(b)).sqrt().item()
        means.append(mean)
        intervals.append((mean - 1.96 * error, mean + 1.96 * error))
    return Difference(means, intervals)


def flops_per_image(model: IsicVQModel) -> dict[str, int]:
    """Floating-point operations of a forward pass of one image.

    Returns:
        `tokenizer`: encoder and decoder. `decoder`: it alone. `prior`: one pass over all codes, which is what training
        takes, and incremental sampling, too.
    """
    config = model.config.vqvae_config
    pixel_values = torch.zeros(1, 3, config.image_size, config.image_size)
    codes = model.encode(pixel_values)
    decoder = count_flops(lambda: model.decode(codes))
    return {
        "tokenizer": count_flops(lambda: model.encode(pixel_values)) + decoder,
        "decoder": decoder,
        "prior": count_flops(lambda: model.predict(codes.clone())),  # a normal tensor: gradients are recorded
    }


def count_flops(step: Callable[[], Any]) -> int:
    """Floating-point operations of products and convolutions that torch does in a call.

    Attention is computed as two products, because the counter ignores its fused kernels for CPUs.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
