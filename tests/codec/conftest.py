"""A tiny composite whose prior is far from uniform, and priors that compute otherwise than their weights say."""

import copy

import pytest
import torch

from isic_vq.models.configuration_isic_vq import IsicVQConfig
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_pixelcnn import PixelCNNModel
from tiny_repository import PRIOR, VQVAE


class DriftingPrior(PixelCNNModel):
    """A prior that is off by `drift` in a bias of its head whenever its cache is opened for one of the `drifts_at`.

    That is what another machine, or another order of sums, does to probabilities; the weights stay what they are.
    """

    drift, drifts_at, openings = 0.0, frozenset(), 0

    @property
    def head(self):
        head = self._modules["head"]
        if self.openings in self.drifts_at:
            head = copy.deepcopy(head)
            head[3].bias.data[0] += self.drift
        self.openings += 1
        return head


@pytest.fixture(scope="session")
def model():
    """The shared composite: not to be changed."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        composite = IsicVQModel(IsicVQConfig(vqvae_config=VQVAE, prior_config=PRIOR)).eval()
        for parameter in composite.prior.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return composite


@pytest.fixture
def drifting_model(model):
    """The same weights in a model whose prior drifts by so much at those openings of its cache."""

    def make(drift, drifts_at):
        prior = DriftingPrior(model.prior.config).eval()
        prior.load_state_dict(model.prior.state_dict())
        prior.drift, prior.drifts_at, prior.openings = drift, drifts_at, 0
        return IsicVQModel.from_parts(model.vqvae, prior)

    return make


@pytest.fixture
def codes():
    """Codes `(11, 4, 4)`, in [0, 8)."""
    return torch.randint(8, (11, 4, 4), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def names():
    return [f"site-{index % 2}/image {index}.jpg" for index in range(11)]
