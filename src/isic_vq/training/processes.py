"""The processes of a run, and collective operations between them: PyTorch's DistributedDataParallel, through accelerate.

Every decision of a run (stop, save, keep as best) is taken once and sent to all, so that every process calls the same
collectives in the same order.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from torch import Tensor

from isic_vq.allocator import keep_freed_memory
from isic_vq.models.modes import label_unrun, was_run
from isic_vq.training.recipe import LoopRecipe

T = TypeVar("T")

# gloo names a lost peer in the text of a RuntimeError only; NCCL raises DistBackendError.
LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused)|timed? ?out|timeout|broken pipe|socket|no route", re.I
)


class TrainingError(RuntimeError):
    """Training cannot continue: the loss is not finite, memory or data ran out, or the folder holds another run."""


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; emulated, as with AVX2, it is many times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    instructions = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(instructions.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def check_trackers(names: list[str]) -> None:
    """Raise TrainingError for a tracker that cannot be imported."""
    missing = set(names) - {tracker.value for tracker in get_available_trackers()}
    if missing:
        raise TrainingError(f"loop.trackers has {sorted(missing)}: pip install 'isic-vq[trackers]'")


class Processes:
    """This process among those of the run, which must be launched for data parallelism; one alone is a group of one."""

    def __init__(self, recipe: LoopRecipe, run_dir: Path, idle_parameters: bool = False):
        keep_freed_memory()
        check_trackers(recipe.trackers)
        probe = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        use_bf16 = recipe.precision == "bf16"
        if recipe.precision == "auto":
            use_bf16 = was_run(probe.type, "bf16") and native_bf16(probe)
        if use_bf16:
            label_unrun(probe.type, "bf16")
        self.accelerator = Accelerator(
            # By default accelerate forms no group of processes on a CPU: each would be a run of its own.
            cpu=not torch.accelerator.is_available(),
            mixed_precision="bf16" if use_bf16 else "no",
            log_with=recipe.trackers or None,
            project_dir=str(run_dir),
            kwargs_handlers=[
                # Buffers stay each process's own: broadcasting rank 0's would hide a codebook that drifts.
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, find_unused_parameters=idle_parameters
                ),
                InitProcessGroupKwargs(timeout=timedelta(seconds=recipe.process_timeout)),
            ],
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main, self.device = self.accelerator.is_main_process, self.accelerator.device
        kind = self.accelerator.distributed_type
        if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise TrainingError(
                f"training was launched with {kind.value}: expected plain data parallelism (DDP). These models fit "
                "one device, and a codebook of moving averages is a buffer that sharding does not keep; "
                "launch without FSDP or DeepSpeed"
            )
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.world:
            raise TrainingError(
                f"{launched} processes were launched, but this one is in a group of {self.world}: each would be a run "
                "of its own in the same folder. Launch one, or use a device that accelerate can group"
            )

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all processes; each gets the total, bit for bit the same."""
        if self.world == 1:
            return tensor
        return self.accelerator.reduce(tensor.to(self.device), "sum")

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.world > 1 and bool(self.sum(torch.tensor(float(flag))).item()) or flag

    def from_main(self, value: T) -> T:
        """The value that the main process passes."""
        if self.world == 1:
            return value
        return broadcast_object_list([value])[0]

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def part(self, size: int) -> slice:
        """This process's share of `size` items in order; shares differ by one at most."""
        return slice(size * self.rank // self.world, size * (self.rank + 1) // self.world)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise a TrainingError where a collective fails because another process ended or did not answer in time."""
        try:
            yield
        except TrainingError:
            raise
        except RuntimeError as error:
            backend_error = isinstance(error, torch.distributed.DistError)
            if self.world == 1 or not (backend_error or LOST_PEER.search(str(error))):
                raise
            sentence = str(error).splitlines()[0].split(". ")[0]
            reason = re.sub(r"^\[[^]]*\] *", "", sentence)  # without the place in gloo's source
            raise TrainingError(
                f"process {self.rank} of {self.world} lost another one ({reason}): look for the first error among the "
                "other processes; then run the same command with --resume"
            ) from error
