"""How models are run: the modes that they are in for a while, and what this project has run on which device."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import PreTrainedModel

logger = logging.getLogger(__name__)

# Date and commit at which the tests marked `gpu`, or a benchmark, ran on a kind of device. What chooses by itself
# (`backend="auto"`, `loop.precision=auto`) chooses nothing else; the rest warns when it is asked for by name.
RUN_ON = {
    ("cpu", "eager"): "2026-11-23, fecbcb8",  # benchmarks/reports/sampling.json
    ("cpu", "compiled"): "2026-11-23, fecbcb8",
    ("cpu", "bf16"): "2026-11-22, bf6c1e9",  # the training of model_cards/isic-vq-128
}


def was_run(device: str, what: str) -> bool:
    """Whether this project has run something on a kind of device, such as "cuda"."""
    return (device, what) in RUN_ON


@functools.cache
def label_unrun(device: str, what: str) -> None:
    """Warn, once, of something that this project has not run on a kind of device."""
    if not was_run(device, what):
        logger.warning("%s on %s is not tested: no machine of this project has run it", what, device)


@functools.cache
def warn_if_slow(device: str, dtype: torch.dtype) -> None:
    """Warn, once, of a 16-bit precision on a CPU without instructions for it: 20 to 60 times slower than float32."""
    names = {torch.float16: "_is_mkldnn_fp16_supported", torch.bfloat16: "_is_mkldnn_bf16_supported"}
    if device != "cpu" or dtype not in names or not torch.backends.mkldnn.is_available():
        return
    if not getattr(torch.ops.mkldnn, names[dtype])():
        logger.warning(
            "this CPU has no instructions for %s, and takes tens of times as long as in torch.float32: load the model with "
            "dtype=torch.float32",
            dtype,
        )


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
    """Load offloaded weights onto their execution device, for a block that reads them outside of `forward`.

    accelerate's and diffusers' hooks do that before a module's `forward` and undo it after it; here they are called around
    the block, for modules whose weights are elsewhere. A module called within the block may offload its weights again.
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
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)] or module.parameters()
    kinds = {tensor.device.type for tensor in tensors}
    return "meta" in kinds or (device is not None and bool(kinds - {torch.device(device).type}))


@contextmanager
def exactly(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, and no autocast: what is kept from step to step is in the weights' own precision."""
    with evaluating(model), torch.autocast(model.device.type, enabled=False):
        yield
