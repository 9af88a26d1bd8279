"""Modes that a model is in for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a block; after it every module is in the mode it was in, even if the block failed."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def exactly(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, and no autocast: what is kept from step to step is in the weights' own precision."""
    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        yield
