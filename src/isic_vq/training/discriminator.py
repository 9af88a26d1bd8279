"""A patch discriminator of decoded and real images, its hinge loss, and LeCam's term.

Sources: PatchGAN, Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", arXiv
1611.07004, appendix 6.1.2; hinge losses, Lim and Ye, arXiv 1705.02894; LeCam's term, Tseng et al., "Regularizing
Generative Adversarial Networks under Limited Data", arXiv 2104.03310, eq. 3 and 5. Differs: GroupNorm where PatchGAN has
BatchNorm, so that the statistics of real and decoded images do not mix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Sequential):
    """Images `(B, 3, H, W)` in [0, 1] to one score per patch `(B, 1, h, w)`: high where they look real.

    With one to three layers of stride 2, a score sees 16, 34 or 70 pixels in height and width.
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


class LeCam(nn.Module):
    """Regularizer that holds each kind's scores near the other kind's moving mean (eq. 3): the two stay close."""

    means: Tensor
    num_updates: Tensor

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("means", torch.zeros(2))  # of real and of fake scores
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def forward(self, real_scores: Tensor, fake_scores: Tensor) -> Tensor:
        """mean (real - mean of fake)^2 + mean (fake - mean of real)^2, the means as they were before this batch's scores."""
        new = torch.stack([real_scores.detach().float().mean(), fake_scores.detach().float().mean()])
        real_mean, fake_mean = self.means if self.num_updates else new
        if self.training:
            self.means = torch.lerp(new, self.means, self.decay) if self.num_updates else new
            self.num_updates += 1
        return (real_scores - fake_mean).square().mean() + (fake_scores - real_mean).square().mean()
