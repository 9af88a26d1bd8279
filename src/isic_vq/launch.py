"""Work that many processes share without talking to each other: which of them this is."""

import os

import torch


def launched_process() -> tuple[int, int]:
    """Rank of this process and number of processes, from what torchrun and accelerate launch set; (0, 1) alone.

    On a machine with several GPUs, the one of its local rank becomes the one it uses.

    Raises:
        ValueError: only one of RANK and WORLD_SIZE is set, or they contradict each other.
    """
    found = [os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(found) == 1:
        raise ValueError(
            "one of RANK and WORLD_SIZE is set in the environment: set both, as torchrun does, or neither"
        )
    rank, world = map(int, found) if found else (0, 1)
    check_process(rank, world)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return rank, world


def check_process(rank: int, world: int) -> None:
    """Raise ValueError unless there is a process of that number."""
    if not 0 <= rank < world:
        raise ValueError(f"this is process {rank} of {world}: expected a number from 0 to {world - 1}")
