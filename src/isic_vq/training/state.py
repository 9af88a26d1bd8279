"""The state of training as tensors and JSON: unlike a pickle, neither can hold code that runs when it is read."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from isic_vq.files import write_atomically, write_tensors

MODEL, OPTIMIZER, SCHEDULE = "model.safetensors", "optimizer.safetensors", "schedule.json"


class TrainingState:
    """Model, optimizer and schedule of a run.

    Args:
        model: not wrapped for several processes.
        optimizer: of its parameters.
        scheduler: of the learning rate; its state is numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
    ):
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler

    def save(self, folder: Path) -> None:
        """Write the three files.

        Raises:
            OSError: one cannot be written.
        """
        optimizer = self.optimizer.state_dict()
        moments = {
            f"{index}.{name}": tensor.contiguous()
            for index, state in optimizer["state"].items()
            for name, tensor in state.items()
        }
        schedule = {"schedule": self.scheduler.state_dict(), "groups": optimizer["param_groups"]}
        weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        write_tensors(folder / MODEL, weights)
        write_tensors(folder / OPTIMIZER, moments)
        write_atomically(folder / SCHEDULE, json.dumps(schedule).encode())

    def load(self, folder: Path) -> None:
        """Restore what `save` has written; all files are read before anything changes.

        Raises:
            OSError, SafetensorError, ValueError, KeyError, RuntimeError: a file is missing, damaged or another model's.
        """
        weights, moments = load_file(folder / MODEL), load_file(folder / OPTIMIZER)
        schedule = json.loads((folder / SCHEDULE).read_text(encoding="utf-8"))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in moments.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = _laid_out_as(parameters[int(index)], tensor)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict({"state": state, "param_groups": schedule["groups"]})
        self.scheduler.load_state_dict(schedule["schedule"])


def _laid_out_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """The tensor in the memory format of its parameter, which fused optimizers take for granted."""
    if tensor.shape != parameter.shape:
        return tensor
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


def save_random_state(path: Path) -> None:
    """Write where Python's, numpy's and torch's global generators stand in this process."""
    name, keys, *position = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *position],  # type: ignore[union-attr]
        "torch": torch.get_rng_state().tolist(),
        "cuda": [device.tolist() for device in torch.cuda.get_rng_state_all()],
    }
    write_atomically(path, json.dumps(state).encode())


def read_random_state(path: Path) -> dict[str, Any]:
    """What `save_random_state` has written.

    Raises:
        OSError, ValueError, KeyError: the file is missing or damaged.
    """
    state = json.loads(path.read_text(encoding="utf-8"))
    version, internal, gauss = state["python"]
    return {
        "python": (version, tuple(internal), gauss),
        "numpy": tuple(state["numpy"]),
        "torch": torch.tensor(state["torch"], dtype=torch.uint8),
        "cuda": [torch.tensor(device, dtype=torch.uint8) for device in state["cuda"]],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put the global generators where `read_random_state` found them."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
