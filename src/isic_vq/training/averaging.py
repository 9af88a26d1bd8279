"""Exponential moving average of a model's trainable parameters.

Source: Polyak averaging with a warm-up, decay_t = min(decay, (1 + t) / (10 + t)), as in TensorFlow's
ExponentialMovingAverage. Buffers are left out: BatchNorm statistics and a moving-average codebook belong to the parameters
with which they were computed, and are re-estimated with the averaged ones.
Differs from torch's `AveragedModel`: it begins with the parameters before the first step, not after it; it copies no frozen
part of a model, such as a feature model; and it swaps its parameters into the model itself, to validate that.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedParameters:
    """Shadow copy of the trainable parameters, by name; `decay` in [0, 1) is the limit of the decay per step.

    With `warms_up` the first parameters are forgotten soon, as the noise of a new model should be.
    """

    def __init__(self, model: nn.Module, decay: float, warms_up: bool = True):
        self.decay, self.num_updates, self.warms_up = decay, 0, warms_up
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """shadow <- decay_t shadow + (1 - decay_t) parameter, for every trainable parameter."""
        self.num_updates += 1
        warm = (1 + self.num_updates) / (10 + self.num_updates) if self.warms_up else 1.0
        decay = min(self.decay, warm)
        parameters = [p.detach() for name, p in model.named_parameters() if name in self.shadow]
        get_ema_multi_avg_fn(decay)(list(self.shadow.values()), parameters, None)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Run a block with the averaged parameters in the model, and restore the raw ones."""
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name in self.shadow:
                parameter.copy_(self.shadow[name])

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name in self.shadow:
                raw = parameter.detach().clone()
                parameter.copy_(self.shadow[name])
                self.shadow[name].copy_(raw)

    def state_dict(self) -> dict[str, Tensor]:
        shadow = {name: tensor.contiguous() for name, tensor in self.shadow.items()}  # safetensors' demand
        return {**shadow, "num_updates": torch.tensor(self.num_updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.num_updates = int(state["num_updates"])
        for name, tensor in self.shadow.items():
            tensor.copy_(state[name])
