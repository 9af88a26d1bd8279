"""The group of processes as one of them sees it; real groups are in test_distributed.py."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from isic_vq.training.processes import Processes, TrainingError, native_bf16
from isic_vq.training.recipe import LoopRecipe


class Numbered(Processes):
    """A process that believes to be one of several."""

    rank, world = 0, 1

    def __init__(self, rank, world):
        self.rank, self.world = rank, world


@pytest.fixture
def alone(tmp_path):
    return Processes(LoopRecipe(precision="fp32"), tmp_path)


def test_a_run_in_one_process_is_a_group_of_one(alone):
    assert (alone.rank, alone.world, alone.is_main) == (0, 1, True)
    assert alone.device.type in ("cpu", "cuda")
    value = torch.tensor([1.5, -2.0])
    assert alone.sum(value) is value
    assert [alone.agree(flag) for flag in (True, False)] == [True, False]
    assert alone.from_main("said") == "said"
    assert alone.part(10) == slice(0, 10)
    alone.wait()


@pytest.mark.parametrize(("size", "world"), [(8, 1), (8, 2), (10, 4), (3, 4), (0, 2), (7, 3)])
def test_shares_cover_everything_in_order_and_differ_by_one_at_most(size, world):
    shares = [list(range(size))[Numbered(rank, world).part(size)] for rank in range(world)]
    assert sum(shares, []) == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"),
            "Connection closed by peer [127.0.0.1]:4711",
        ),
        (
            RuntimeError("Timed out waiting 600000ms for recv operation"),
            "Timed out waiting 600000ms for recv",
        ),
        (
            RuntimeError("Read error [127.0.0.1]: Connection reset by peer"),
            "Read error [127.0.0.1]: Connection",
        ),
        (torch.distributed.DistBackendError("NCCL error: remote\nlast error: x"), "NCCL error: remote)"),
    ],
    ids=["closed", "timeout", "reset", "nccl"],
)
def test_a_lost_process_is_named_with_the_way_on(error, told):
    with pytest.raises(TrainingError) as caught, Numbered(1, 4).watched():
        raise error
    assert str(caught.value).startswith(f"process 1 of 4 lost another one ({told}")
    assert str(caught.value).endswith(
        "look for the first error among the other processes; then run the same command with --resume"
    )
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), TrainingError("socket"), ValueError("x")]
)
@pytest.mark.parametrize("world", [1, 2])
def test_other_errors_pass_as_they_are(error, world):
    with pytest.raises(type(error)) as caught, Numbered(0, world).watched():
        raise error
    assert caught.value is error


def test_a_run_in_one_process_loses_no_other():
    with pytest.raises(RuntimeError, match="^Connection closed by peer$") as caught, Numbered(0, 1).watched():
        raise RuntimeError("Connection closed by peer")
    assert not isinstance(caught.value, TrainingError)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_training_is_refused_by_name(monkeypatch, tmp_path, kind):
    """The launchers of these need devices that are not here: accelerate is told its answer."""
    monkeypatch.setattr(Accelerator, "distributed_type", kind)
    with pytest.raises(TrainingError, match=f"launched with {kind.value}: expected plain data parallelism"):
        Processes(LoopRecipe(precision="fp32"), tmp_path)


def test_bfloat16_is_chosen_where_the_processor_multiplies_it(monkeypatch):
    for capabilities, chosen in (
        ({"avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "arm64", "neon": True}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert native_bf16(torch.device("cpu")) is chosen, capabilities
    assert native_bf16(torch.device("meta")) is False


def test_precision_of_the_recipe_is_accelerates(alone):
    assert alone.accelerator.mixed_precision == "no"
