"""What the package is compared with: minimal loops, public libraries, usual masked layers.

Every peer of a network is a module that returns its training loss, so that all of them can be trained by the same
few lines; every quantizer takes latents `(B, D, h, w)` and returns them quantized with its loss. Libraries are
optional and imported only when they are asked for; nothing of them is copied.
"""

from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.modeling_pixelcnn import PixelCNNGatedLayer, PixelCNNModel, gate
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.models.vector_quantizer import VQVAEVectorQuantizer

PYTHAE_HOW = (
    "Install the peer and what it imports: pip install --no-deps pythae==0.1.2, "
    "then pip install cloudpickle imageio pydantic scipy"
)
VECTOR_QUANTIZE = "vector-quantize-pytorch==1.32.0"


class MinimalQuantizer(nn.Module):
    """The least a moving-average codebook needs: no chunks, no resets, no smoothing, no metrics.

    Args:
        codebook (`torch.Tensor` of shape `(K, D)`): where it starts.
        counts (`torch.Tensor` of shape `(K,)`): latents per code and step to start with.
        decay: of counts and sums, per step.
    """

    def __init__(self, codebook: Tensor, counts: Tensor, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("codebook", codebook.clone())
        self.register_buffer("counts", counts.clone())
        self.register_buffer("sums", codebook * counts[:, None])

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize latents `(B, D, h, w)`; returns them and the commitment loss."""
        batch, dim, height, width = latents.shape
        with torch.no_grad():
            flat = latents.permute(0, 2, 3, 1).reshape(-1, dim)
            codes = torch.addmm(self.codebook.square().sum(1), flat, self.codebook.t(), alpha=-2).argmin(1)
            quantized = self.codebook[codes].view(batch, height, width, dim).permute(0, 3, 1, 2)
            counts = torch.bincount(codes, minlength=len(self.counts)).float()
            self.counts.lerp_(counts, 1 - self.decay)
            self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, codes, flat), 1 - self.decay)
            self.codebook.copy_(self.sums / self.counts.clamp(min=1e-5)[:, None])
        return latents + (quantized - latents).detach(), F.mse_loss(latents, quantized)


class PackageQuantizer(nn.Module):
    """The package's quantizer, returning what the others return."""

    def __init__(self, quantizer: VQVAEVectorQuantizer):
        super().__init__()
        self.quantizer = quantizer

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize latents `(B, D, h, w)`; returns them and the commitment loss."""
        output = self.quantizer(latents)
        return output.quantized, output.commitment_loss


class VectorQuantizePytorch(nn.Module):
    """`VectorQuantize` of vector-quantize-pytorch, given the tokens `(B, h w, D)` it takes by default.

    Of channels-last latents these are a view.

    Args:
        codebook (`torch.Tensor` of shape `(K, D)`): where it starts.
        counts (`torch.Tensor` of shape `(K,)`): latents per code and step to start with.
        decay: of counts and sums, per step.
        settings: of the library.
    """

    def __init__(self, codebook: Tensor, counts: Tensor, decay: float, **settings: Any):
        super().__init__()
        try:
            from vector_quantize_pytorch import VectorQuantize
        except ImportError as error:
            raise SystemExit(
                f"{error}. Install the peer and what it imports apart: pip install --no-deps --target build/peers "
                f"{VECTOR_QUANTIZE} einops einx frozendict loguru torch-einops-utils, then set PYTHONPATH=build/peers"
            ) from error
        self.quantizer = VectorQuantize(codebook.shape[1], len(codebook), decay=decay, **settings)
        state = self.quantizer._codebook
        state.embed.copy_(codebook)
        state.cluster_size.copy_(counts)
        state.embed_avg.copy_(codebook * counts[:, None])

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize latents `(B, D, h, w)`; returns them and the commitment loss."""
        tokens, _, loss = self.quantizer(latents.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).view(latents.shape), loss


class DiffusersQuantizer(nn.Module):
    """The quantizer of diffusers' `VQModel`, which learns its codebook by gradient.

    Args:
        codebook (`torch.Tensor` of shape `(K, D)`): where it starts.
        beta: weight of the commitment loss.
    """

    def __init__(self, codebook: Tensor, beta: float):
        super().__init__()
        try:
            from diffusers.models.autoencoders.vq_model import VectorQuantizer as Quantizer
        except ImportError as error:
            raise SystemExit(f"{error}. Install the peer: pip install diffusers") from error
        self.quantizer = Quantizer(*codebook.shape, beta=beta, legacy=False)
        self.quantizer.embedding.weight.data.copy_(codebook)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize latents `(B, D, h, w)`; returns them and codebook loss + beta commitment loss."""
        quantized, loss, _ = self.quantizer(latents)
        return quantized, loss


class MinimalVQVAE(nn.Module):
    """A VQ-VAE written out by hand around given halves."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, quantizer: nn.Module, beta: float):
        super().__init__()
        self.encoder, self.decoder, self.quantizer, self.beta = encoder, decoder, quantizer, beta

    def forward(self, images: Tensor) -> Tensor:
        """L1 + MSE + beta commitment of images `(B, 3, H, W)` in [0, 1]."""
        latents = self.encoder(images)
        with torch.autocast("cpu", enabled=False):  # distances need float32
            quantized, commitment = self.quantizer(latents.float())
        difference = self.decoder(quantized).float() - images
        return difference.abs().mean() + difference.square().mean() + self.beta * commitment


@torch.no_grad()
def start_codebook(model: VQVAEModel, pixel_values: Tensor) -> None:
    """Put the codebook at random latents, so that contestants start alike and no code is dead."""
    latents = model.train().embed(pixel_values)
    latents = latents.permute(0, 2, 3, 1).reshape(-1, model.config.code_dim)
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))
    num_codes = model.config.num_codes
    share = torch.full((num_codes,), len(latents) / num_codes, device=latents.device)
    model.quantizer.start_from(latents[order[:num_codes]], share)


def pythae_vqvae(encoder: nn.Module, decoder: nn.Module, config: VQVAEConfig, **settings: Any) -> nn.Module:
    """The VQ-VAE of pythae around given halves, with the sizes of `config` and else as pythae has it by default.

    Its forward pass takes {"data": images} and returns an object with the `loss`. It is run by hand rather
    than by its own trainer, which adds a data loader and callbacks to the same step.
    """
    try:
        from pythae.models import VQVAE
        from pythae.models import VQVAEConfig as PythaeConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder
    except ImportError as error:
        raise SystemExit(f"{error}. {PYTHAE_HOW}") from error

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = encoder

        def forward(self, images: Tensor) -> ModelOutput:
            return ModelOutput(embedding=self.net(images))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.net = decoder

        def forward(self, quantized: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.net(quantized))

    side = config.image_size
    sizes = PythaeConfig(
        input_dim=(config.num_channels, side, side),
        latent_dim=config.code_dim * config.grid_size**2,
        num_embeddings=config.num_codes,
        **settings,
    )
    return VQVAE(sizes, Encoder(), Decoder())


class MaskedConv2d(nn.Conv2d):
    """A same-size convolution with all its taps, some of them zeroed by a mask before each call."""

    def __init__(self, size_in: int, size_out: int, kernel: tuple[int, int], kept: tuple[int, int]):
        height, width = kernel
        super().__init__(size_in, size_out, kernel, padding=(height // 2, width // 2))
        mask = torch.zeros_like(self.weight)
        mask[:, :, : kept[0], : kept[1]] = 1
        self.register_buffer("mask", mask)

    def forward(self, features: Tensor) -> Tensor:
        """Features `(B, C, h, w)` to `(B, size_out, h, w)`."""
        self.weight.data *= self.mask
        return super().forward(features)


class FullTapLayer(nn.Module):
    """`PixelCNNGatedLayer` with masked k x k and 1 x k convolutions, computing the same function.

    Args:
        layer: the layer whose weights it takes over.
    """

    def __init__(self, layer: PixelCNNGatedLayer):
        super().__init__()
        self.first = layer.first
        width, side = layer.vertical.out_channels, 2 * layer.reach + 1
        kept = layer.reach if layer.first else layer.reach + 1
        self.vertical = MaskedConv2d(width // 2, width, (side, side), (kept, side))
        self.horizontal = MaskedConv2d(width // 2, width, (1, side), (1, kept))
        with torch.no_grad():
            self.vertical.weight[:, :, :kept] = layer.vertical.weight
            self.horizontal.weight[..., :kept] = layer.horizontal.weight
            self.vertical.bias.copy_(layer.vertical.bias)
            self.horizontal.bias.copy_(layer.horizontal.bias)
        for name in ("vertical_to_horizontal", "output", "class_bias", "dropout"):
            setattr(self, name, deepcopy(getattr(layer, name)))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Two stacks and labels or, in the first layer, codes, their embedding and labels."""
        vertical, horizontal, labels = inputs
        if self.first:
            vertical = horizontal = F.embedding(vertical, horizontal).permute(0, 3, 1, 2)
        class_vertical, class_horizontal = self.class_bias(labels)[:, :, None, None].chunk(2, dim=1)
        above = self.vertical(vertical)
        new_vertical = gate(above + class_vertical)
        left = self.horizontal(horizontal)
        new_horizontal = gate(left + self.vertical_to_horizontal(above) + class_horizontal)
        new_horizontal = self.dropout(self.output(new_horizontal))
        if self.first:
            return new_vertical, new_horizontal
        return vertical + new_vertical, horizontal + new_horizontal


def full_tap_pixelcnn(model: PixelCNNModel) -> PixelCNNModel:
    """A gated PixelCNN of the same function and the same weights whose layers have all their taps."""
    peer = deepcopy(model)
    peer.layers = nn.ModuleList([FullTapLayer(layer) for layer in peer.layers])
    return peer


def pythae_pixelcnn(num_codes: int, num_layers: int) -> nn.Module:
    """The ungated PixelCNN of pythae, kernel 5, whose sampler runs it once per position on all images."""
    try:
        from pythae.models.normalizing_flows import PixelCNN, PixelCNNConfig
    except ImportError as error:
        raise SystemExit(f"{error}. {PYTHAE_HOW}") from error
    settings = PixelCNNConfig(input_dim=(1, 1, 1), n_embeddings=num_codes, n_layers=num_layers, kernel_size=5)
    return PixelCNN(settings)
