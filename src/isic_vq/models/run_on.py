"""What this project has run, by kind of device: the date and commit of the run.

What chooses by itself (`backend="auto"`, `loop.precision=auto`) chooses nothing else. Whatever is not in the list is there
to be asked for by name, and says so. Add a line with the commit at which the tests marked `gpu`, or a benchmark, ran.
"""

import functools
import logging

import torch

logger = logging.getLogger(__name__)

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
