"""A patch discriminator and the hinge losses: what tells decoded from real images, patch by patch.

Sources: PatchGAN, Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", arXiv
1611.07004, appendix 6.1.2; hinge losses, Lim and Ye, arXiv 1705.02894; adaptive weight, Esser et al., "Taming
Transformers", arXiv 2012.09841, eq. 7. Differs: GroupNorm where they have BatchNorm, so that the statistics of real
and decoded images do not mix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Sequential):
    """Images `(B, 3, H, W)` in [0, 1] to one score per patch `(B, 1, h, w)`: high where they look real.

    Args:
        channels: of the first layer; they double with each of the later ones.
        num_layers: stride-2 convolutions; with three a score sees 70 x 70 pixels.
    """

    def __init__(self, channels: int = 32, num_layers: int = 3):
        sizes = [channels * min(2**index, 8) for index in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index, (size_in, size_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            stride = 2 if index < num_layers - 1 else 1
            layers += [
                nn.Conv2d(size_in, size_out, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(8, size_out),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv2d(sizes[-1], 1, 4, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(2 * images - 1)


def discriminator_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Hinge loss of the discriminator: real scores above 1 and fake ones below -1 cost nothing."""
    return 0.5 * (F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean())


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_weight: Tensor) -> Tensor:
    """Factor that makes both losses pull equally hard at the decoder's last layer (eq. 7), at most 10,000."""
    pull = torch.autograd.grad(reconstruction_loss, last_weight, retain_graph=True)[0].norm()
    push = torch.autograd.grad(adversarial_loss, last_weight, retain_graph=True)[0].norm()
    return (pull / (push + 1e-4)).clamp(max=1e4).detach()
