"""The VQ-VAE tokenizer: encoder, vector quantizer, decoder.

Source: van den Oord et al., arXiv 1711.00937; layer order after the report "Image Generation using
VQ-VAE and Pixel CNN": every convolution is followed by normalisation and ReLU, the decoder mirrors the
encoder with transposed convolutions, a sigmoid closes it.
Differs: the encoder ends in a linear 1x1 projection to the code dimension (a ReLU there would leave half
of the code space empty), the decoder's last transposed convolution has the sigmoid alone, and convolutions at full
resolution may correct its pixels before the sigmoid.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from .checks import check_finite, check_pixels, damaged_or_overflow
from .configuration_vqvae import VQVAEConfig
from .modes import evaluating, warn_if_slow, weights_at_hand
from .residual_quantizer import VQVAEPhi, VQVAEResidualQuantizer
from .strict_loading import StrictLoading
from .vector_quantizer import VQVAEVectorQuantizer


@dataclass
class VQVAEOutput(ModelOutput):
    """Output of `VQVAEModel`.

    Args:
        loss: scalar, l1_weight * l1_loss + mse_weight * mse_loss + beta * commitment_loss
            (+ codebook_loss where something learns by it: a codebook by gradient, or the convolutions between scales).
        reconstruction: `(B, 3, H, W)`, RGB in [0, 1].
        codes: int64 in [0, K), `(B, h, w)` or, of several scales, `(B, L)`; None when `quantize=False`.
        latents: `(B, D, h, w)`, the encoder's output.
        l1_loss: scalar, mean absolute error over B, 3, H, W.
        mse_loss: scalar, mean squared error over B, 3, H, W.
        commitment_loss: scalar, mean of (z - sg(e))^2 over B, D, h, w.
        codebook_loss: scalar, mean of (sg(z) - e)^2.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    codes: Tensor | None = None
    latents: Tensor | None = None
    l1_loss: Tensor | None = None
    mse_loss: Tensor | None = None
    commitment_loss: Tensor | None = None
    codebook_loss: Tensor | None = None


def norm_layer(norm: str, channels: int) -> nn.Module:
    """BatchNorm, or GroupNorm in (up to) eight groups."""
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.GroupNorm(math.gcd(8, channels), channels)


def conv_norm_relu(conv: nn.Module, norm: str) -> nn.Sequential:
    """Follow a (transposed) convolution by normalisation and ReLU."""
    return nn.Sequential(conv, norm_layer(norm, conv.out_channels), nn.ReLU())


class VQVAEResidualBlock(nn.Module):
    """relu(x + norm(conv1x1(relu(norm(conv3x3(x)))))): shape-preserving, `(B, C, h, w)`."""

    def __init__(self, channels: int, config: VQVAEConfig):
        super().__init__()
        inner, outer = config.residual_size, norm_layer(config.norm, channels)
        self.inner = conv_norm_relu(nn.Conv2d(channels, inner, 3, padding=1, bias=False), config.norm)
        self.outer = nn.Sequential(nn.Conv2d(inner, channels, 1, bias=False), outer)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.relu(hidden + self.outer(self.inner(hidden)))


def residual_blocks(channels: int, config: VQVAEConfig) -> nn.Sequential:
    """As many blocks as the config asks for, in encoder and decoder each."""
    return nn.Sequential(*(VQVAEResidualBlock(channels, config) for _ in range(config.num_residual_blocks)))


class VQVAEEncoder(nn.Module):
    """Image `(B, 3, H, W)` to latents `(B, D, H/f, W/f)`: space shrinks, depth grows."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        sizes = [config.num_channels, *config.hidden_sizes]
        self.down = nn.Sequential(
            *(
                conv_norm_relu(nn.Conv2d(size_in, size_out, 4, stride=2, padding=1, bias=False), config.norm)
                for size_in, size_out in zip(sizes, sizes[1:], strict=False)
            )
        )
        self.blocks = residual_blocks(sizes[-1], config)
        self.project = nn.Conv2d(sizes[-1], config.code_dim, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.project(self.blocks(self.down(2 * pixel_values - 1)))


class VQVAEZeroConv2d(nn.Conv2d):
    """A convolution that starts at zero."""


def pixel_noise(codes: Tensor, size: int) -> Tensor:
    """White noise `(B, 1, size, size)`, mean 0 and variance 1, that is a function of code and place.

    Codes do not determine fine texture, and a decoder without noise repeats the same texture for every code: a grid.
    It is a hash rather than a generator, so that an image depends on its codes alone, on every device and in ONNX, and so
    that an edited code changes the noise of its own pixels only.

    Args:
        codes (`torch.LongTensor` of shape `(B, h, w)`): a square grid; h need not divide `size`, as that of a coarse scale.
        size: side of the noise in pixels, at least h.
    """
    nearest = torch.arange(size, device=codes.device) * codes.shape[-1] // size
    spread = codes[:, nearest][:, :, nearest][:, None]
    place = torch.arange(size * size, device=codes.device).view(size, size)
    prime = 2**31 - 1  # squares of what is below it fit in 64 bits
    value = (spread * 1_000_003 + place * 69_069 + 12_345) % prime
    for _ in range(3):
        value = (value * value + 1_013_904_223) % prime
    return (value.float() / prime - 0.5) * 12**0.5


class VQVAERefinement(nn.Module):
    """Correction, initially zero, of an image's logits `(B, C, H, W)` by three 3x3 convolutions at full resolution.

    A transposed convolution has different weights for each pixel of its stride, and so can draw a grid. These convolutions have
    the same weights for all pixels, and make texture from noise.
    """

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.first = nn.Conv2d(channels + 1, size, 3, padding=1)
        self.second = nn.Conv2d(size, size, 3, padding=1)
        self.last = VQVAEZeroConv2d(size, channels, 3, padding=1)

    def forward(self, logits: Tensor, codes: Tensor | None) -> Tensor:
        if codes is None:
            noise = torch.zeros_like(logits[:, :1])
        else:
            noise = pixel_noise(codes, logits.shape[-1]).to(logits.dtype)
        hidden = F.relu(self.first(torch.cat([logits, noise], dim=1)))
        return logits + self.last(F.relu(self.second(hidden)))


class VQVAEDecoder(nn.Module):
    """Quantized latents `(B, D, h, w)` to an image `(B, 3, h*f, w*f)` in [0, 1]: the encoder, mirrored."""

    def __init__(self, config: VQVAEConfig):
        super().__init__()
        sizes = list(reversed(config.hidden_sizes))
        self.project = conv_norm_relu(nn.Conv2d(config.code_dim, sizes[0], 1, bias=False), config.norm)
        self.blocks = residual_blocks(sizes[0], config)
        self.up = nn.Sequential(
            *(
                conv_norm_relu(
                    nn.ConvTranspose2d(size_in, size_out, 4, stride=2, padding=1, bias=False), config.norm
                )
                for size_in, size_out in zip(sizes, sizes[1:], strict=False)
            )
        )
        self.to_pixels = nn.ConvTranspose2d(sizes[-1], config.num_channels, 4, stride=2, padding=1)
        self.refinement = (
            VQVAERefinement(config.num_channels, config.refinement_size) if config.refinement_size else None
        )

    def forward(self, quantized: Tensor, codes: Tensor | None = None) -> Tensor:
        """Decode vectors `(B, D, h, w)`.

        Args:
            quantized: the vectors.
            codes: the finest grid of codes `(B, h', w')`, which determines a refinement's noise; None decodes without noise.
        """
        logits = self.to_pixels(self.up(self.blocks(self.project(quantized))))
        return (logits if self.refinement is None else self.refinement(logits, codes)).sigmoid()


class VQVAEModel(StrictLoading, PreTrainedModel):
    """Tokenizer between images in [0, 1] and grids of codes.

    Examples:
        >>> import torch
        >>> from isic_vq import VQVAEConfig, VQVAEModel
        >>> model = VQVAEModel(VQVAEConfig(image_size=32, hidden_sizes=(8, 8), num_codes=16)).eval()
        >>> codes = model.encode(torch.rand(2, 3, 32, 32))
        >>> codes.shape, model.decode(codes).shape
        (torch.Size([2, 8, 8]), torch.Size([2, 3, 32, 32]))
    """

    config: VQVAEConfig
    base_model_prefix = "vqvae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["VQVAEResidualBlock", "VQVAERefinement"]
    _supports_sdpa = True  # as the whole model asks of its parts; it has no attention
    _keys_to_ignore_on_load_unexpected = [r"^prior\."]
    # Distances between latents and codes need float32 even when the convolutions run in bfloat16.
    _keep_in_fp32_modules_strict = [
        "quantizer.codebook",
        "quantizer.cluster_size",
        "quantizer.code_sums",
        "quantizer.phi",
    ]

    def __init__(self, config: VQVAEConfig):
        super().__init__(config)
        self.encoder = VQVAEEncoder(config)
        codebook = {
            "num_codes": config.num_codes,
            "code_dim": config.code_dim,
            "update": config.codebook_update,
            "decay": config.ema_decay,
            "epsilon": config.ema_epsilon,
            "dead_code_threshold": config.dead_code_threshold,
        }
        self.quantizer = (
            VQVAEResidualQuantizer(config.scales, config.num_phi, **codebook)
            if config.scales
            else VQVAEVectorQuantizer(**codebook)
        )
        self.decoder = VQVAEDecoder(config)
        if not config.scales:
            kept = self._keep_in_fp32_modules_strict
            self._keep_in_fp32_modules_strict = [name for name in kept if name != "quantizer.phi"]
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, VQVAEPhi):
            init.dirac_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, VQVAEZeroConv2d):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, VQVAEVectorQuantizer):
            init.normal_(module.codebook)
            init.ones_(module.cluster_size)
            init.copy_(module.code_sums, module.codebook)
            init.zeros_(module.num_updates)
        else:
            super()._init_weights(module)  # BatchNorm and GroupNorm: ones and zeros

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Encoder output `(B, D, h, w)` for images `(B, 3, H, W)` in [0, 1].

        Raises:
            ValueError: if the images are not square RGB of a side divisible by the downsampling.
        """
        step, shape = self.config.downsampling, tuple(pixel_values.shape)
        if len(shape) != 4 or shape[1] != self.config.num_channels or shape[2] != shape[3] or shape[2] % step:
            raise ValueError(
                f"pixel_values has shape {shape}: expected (batch, {self.config.num_channels}, side, side) with "
                f"side a multiple of {step}, as the image processor makes it"
            )
        return self.encoder(pixel_values)

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Codes, int64 in [0, K), of images `(B, 3, H, W)` in [0, 1]; never learns, in either mode.

        They are `(B, h, w)` or, of several scales, `(B, L)`; see `code_grids`.

        Raises:
            ValueError: images of another shape or range, or pixels or latents that are not finite.
        """
        warn_if_slow(self.device.type, self.dtype)
        pixel_values = check_pixels(pixel_values, self.dtype)
        with weights_at_hand(self.quantizer), evaluating(self):
            latents = self.embed(pixel_values)
            check_finite(latents, "latents", damaged_or_overflow(self.dtype))
            return self.quantizer.encode(latents)

    @torch.no_grad()
    def decode(self, codes: Tensor, noise: bool = True) -> Tensor:
        """Images `(B, 3, H, W)` in [0, 1] of codes in [0, K); never learns, in either mode.

        Args:
            codes (`torch.LongTensor` of shape `(B, h, w)` or, of several scales, `(B, L)`): of these the first
                scales alone are enough, and make a coarser image.
            noise: False leaves out the texture that a refinement draws from `pixel_noise`, to compare images of codes.

        Raises:
            ValueError: a code outside [0, K), codes that are not those of whole scales, or pixels that are not finite.
        """
        warn_if_slow(self.device.type, self.dtype)
        with weights_at_hand(self.quantizer), evaluating(self):
            quantized = self.quantizer.lookup(codes).to(self.dtype)
            check_finite(quantized, "codebook vectors", damaged_or_overflow(self.dtype))
            return check_finite(
                self.decoder(quantized, self.code_grids(codes)[-1] if noise else None),
                "decoded pixels",
                damaged_or_overflow(self.dtype),
            )

    def decode_progressively(self, codes: Tensor) -> list[Tensor]:
        """Images `(B, 3, H, W)` of the first code grid, of the first two, and so on to all; without scales there is one."""
        sizes = [grid[0].numel() for grid in self.code_grids(codes)]
        flat = codes.flatten(1)
        prefixes = [flat[:, : sum(sizes[: number + 1])] for number in range(len(sizes) - 1)]
        return [self.decode(part) for part in (*prefixes, codes)]

    @torch.no_grad()
    def decode_alone(self, codes: Tensor, side: int = 1) -> Tensor:
        """Images `(N, 3, side * f, side * f)` of single codes `(N,)`: the vector of each fills a grid."""
        with weights_at_hand(self.quantizer), evaluating(self):
            vectors = self.quantizer.codebook[codes][:, :, None, None].expand(-1, -1, side, side)
            pixels = self.decoder(vectors.to(self.dtype), codes[:, None, None].expand(-1, side, side))
        return check_finite(pixels, "decoded pixels", damaged_or_overflow(self.dtype))

    def code_grids(self, codes: Tensor) -> list[Tensor]:
        """An image's codes as square grids `(B, side, side)`, coarse to fine; a tokenizer without scales has one."""
        return self.quantizer.grids(codes)

    @torch.no_grad()
    def context(self, codes: Tensor) -> Tensor:
        """A prior's input for later scales: features of all coarser ones, resized to each scale.

        It is `(B, L - first side squared, D)` of codes `(B, L)`: a row for each code after the first scale.
        """
        with weights_at_hand(self.quantizer):
            return self.quantizer.context(codes)

    @torch.no_grad()
    def extend(self, features: Tensor | None, codes: Tensor, index: int) -> tuple[Tensor, Tensor | None]:
        """`context`, scale by scale; see `VQVAEResidualQuantizer.extend`."""
        with weights_at_hand(self.quantizer):
            return self.quantizer.extend(features, codes, index)

    @can_return_tuple
    def forward(self, pixel_values: Tensor, quantize: bool = True, return_loss: bool = True) -> VQVAEOutput:
        """Reconstruct images and report every loss; returns a tuple with `return_dict=False`.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): RGB in [0, 1].
            quantize: False skips the quantizer, which makes a plain autoencoder: the warm-up before the
                codebook's k-means start.
            return_loss: False leaves the losses out.
        """
        latents = self.embed(pixel_values.to(self.dtype))
        if quantize:
            quantization = self.quantizer(latents)
            codes = quantization.codes
            reconstruction = self.decoder(
                quantization.quantized.to(latents.dtype), self.code_grids(codes)[-1]
            )
            commitment_loss, codebook_loss = quantization.commitment_loss, quantization.codebook_loss
        else:
            reconstruction, codes = self.decoder(latents), None
            commitment_loss = codebook_loss = latents.new_zeros(())
        if not return_loss:
            return VQVAEOutput(reconstruction=reconstruction, codes=codes, latents=latents)
        precise = torch.promote_types(reconstruction.dtype, torch.float32)
        difference = reconstruction.to(precise) - pixel_values.to(precise)
        l1_loss, mse_loss = difference.abs().mean(), difference.square().mean()
        loss = self.config.l1_weight * l1_loss + self.config.mse_weight * mse_loss
        loss = loss + self.config.beta * commitment_loss  # eq. 3, third term
        if self.quantizer.learns_by_loss:
            loss = loss + codebook_loss  # eq. 3, second term
        return VQVAEOutput(
            loss=loss,
            reconstruction=reconstruction,
            codes=codes,
            latents=latents,
            l1_loss=l1_loss,
            mse_loss=mse_loss,
            commitment_loss=commitment_loss,
            codebook_loss=codebook_loss,
        )
