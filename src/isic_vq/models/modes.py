"""Modes that a model is in for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
def weights_at_hand(module: nn.Module) -> Iterator[None]:
    """Bring weights that were offloaded to where they are computed with, for a block that reads them outside of `forward`.

    accelerate's and diffusers' hooks do that before a module's `forward` and undo it after it; here they do so for the
    block, but for modules whose weights are there. A module that is called within it may send its weights away again, and then
    brings them itself.
    """
    hooks: list[tuple[nn.Module, Any]] = []
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        if hook is not None and _is_elsewhere(part, getattr(hook, "execution_device", None)):
            hooks.append((part, hook))
        hook = getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).get("group_offloading")
        if hook is not None and _is_elsewhere(part, hook.group.onload_device):
            hooks.append((part, hook))
    for part, hook in hooks:
        hook.pre_forward(part)
    try:
        yield
    finally:
        for part, hook in reversed(hooks):
            hook.post_forward(part, None)


def _is_elsewhere(module: nn.Module, device: Any) -> bool:
    """Whether tensors of a module, its own ones if it has any, lie on another kind of device."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)] or module.parameters()
    kinds = {tensor.device.type for tensor in own}
    return "meta" in kinds or (device is not None and bool(kinds - {torch.device(device).type}))


@contextmanager
def exactly(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, and no autocast: what is kept from step to step is in the weights' own precision."""
    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        yield
