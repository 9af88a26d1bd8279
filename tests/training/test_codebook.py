"""One codebook for all processes and micro-batches: what it learns is what one quantizer learns from the whole batch."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from isic_vq.models.vector_quantizer import VQVAEVectorQuantizer
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import LoopRecipe
from isic_vq.training.vqvae import SharedCodebook, SharedRows

NUM_CODES, CODE_DIM = 6, 3


class Member:
    """One thread of a group that adds tensors up as `Processes` does."""

    def __init__(self, rank, world, given, barrier):
        self.rank, self.world, self.given, self.barrier = rank, world, given, barrier

    def sum(self, tensor):
        self.given[self.rank] = tensor
        self.barrier.wait()
        total = torch.stack(self.given).sum(0)
        self.barrier.wait()
        return total


def in_threads(world, function):
    """What `function(member)` returns in each of `world` threads, in order."""
    given, barrier = [None] * world, threading.Barrier(world, timeout=60)
    members = [Member(rank, world, given, barrier) for rank in range(world)]
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(function, members))


@pytest.fixture
def alone(tmp_path):
    return Processes(LoopRecipe(precision="fp32"), tmp_path)


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


# Rows


@pytest.mark.parametrize(
    "sizes",
    [
        [[4, 4], [4, 4]],
        [[3, 2], [2, 5], [1, 1]],
        [[0, 3], [4, 0]],
        [[2, 3, 1], [1, 0, 4]],
        [[5], [2]],
    ],
    ids=str,
)
def test_rows_are_numbered_in_sample_order(sizes):
    """`sizes[m][r]` latents of micro-batch m in process r; a corrupt image makes one shorter."""
    world = len(sizes[0])
    parts = [
        [normal(size, CODE_DIM, seed=10 * m + r) for r, size in enumerate(row)] for m, row in enumerate(sizes)
    ]
    whole = torch.cat([part for row in parts for part in row])
    wanted = torch.from_numpy(np.random.default_rng(1).integers(len(whole), size=20))

    def ask(member):
        rows = SharedRows([row[member.rank] for row in parts], member)
        return rows.total, rows.at(wanted), rows.at(torch.arange(rows.total))

    for total, some, everything in in_threads(world, ask):
        assert total == len(whole)
        assert torch.equal(some, whole[wanted])
        assert torch.equal(everything, whole)


def test_rows_of_one_process_are_its_parts_joined(alone):
    parts = [normal(4, CODE_DIM, seed=1), normal(3, CODE_DIM, seed=2)]
    rows = SharedRows(parts, alone)
    assert rows.total == 7
    assert torch.equal(rows.at(torch.tensor([6, 0, 4, 4])), torch.cat(parts)[[6, 0, 4, 4]])


# Learning


def make_quantizer(update="ema"):
    """Codes 3 to 5 lie where no latent comes: their count falls below the threshold at once."""
    quantizer = (
        VQVAEVectorQuantizer(
            NUM_CODES, CODE_DIM, update=update, decay=0.5, epsilon=1e-5, dead_code_threshold=0.9
        )
        .double()
        .train()
    )
    codebook = normal(NUM_CODES, CODE_DIM, seed=5)
    codebook[3:] += 100
    quantizer.start_from(codebook, torch.ones(NUM_CODES, dtype=torch.float64))
    return quantizer


def as_grid(latents):
    """Latents (N, D) as one image (1, D, 1, N)."""
    return latents.t()[None, :, None, :].contiguous()


def pass_of(step, micro_batch, rank=0):
    return normal(7 + rank, CODE_DIM, seed=100 * step + 10 * micro_batch + rank)


def assert_same_state(found, expected):
    assert found.num_updates == expected.num_updates
    for name in ("codebook", "cluster_size", "code_sums"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_two_noted_passes_teach_what_the_whole_batch_teaches(alone, update):
    shared, whole = make_quantizer(update), make_quantizer(update)
    codebook = SharedCodebook(shared, alone)
    for step in range(3):
        passes = [pass_of(step, micro_batch) for micro_batch in (0, 1)]
        for latents in passes:
            shared(as_grid(latents))
        codebook.update()
        whole(as_grid(torch.cat(passes)))
        assert_same_state(shared, whole)
    assert shared.num_updates == 3


@pytest.mark.parametrize("world", [2, 3])
def test_processes_learn_one_codebook_which_is_that_of_the_whole_batch(world):
    whole = make_quantizer()
    for step in range(2):
        passes = [pass_of(step, micro_batch, rank) for micro_batch in (0, 1) for rank in range(world)]
        whole(as_grid(torch.cat(passes)))

    def learn(member):
        quantizer = make_quantizer()
        codebook = SharedCodebook(quantizer, member)
        for step in range(2):
            for micro_batch in (0, 1):
                quantizer(as_grid(pass_of(step, micro_batch, member.rank)))
            codebook.update()
        return quantizer

    first, *others = in_threads(world, learn)
    assert_same_state(first, whole)
    for other in others:
        for name, value in first.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), f"{name} drifts apart"


def test_dead_codes_move_onto_the_same_latents_whatever_the_batch_is_cut_into(alone):
    shared, whole = make_quantizer(), make_quantizer()
    passes = [pass_of(0, micro_batch) for micro_batch in (0, 1)]
    codebook = SharedCodebook(shared, alone)
    for latents in passes:
        shared(as_grid(latents))
    codebook.update()
    whole(as_grid(torch.cat(passes)))
    assert torch.equal(shared.codebook[3:], whole.codebook[3:]), "the very same rows, not nearly"
    for vector in shared.codebook[3:]:
        assert (torch.cat(passes) == vector).all(1).any(), "a moved code lies on a latent of the step"


# Perplexity, and what teaches nothing


def test_perplexity_is_that_of_the_codes_of_all_passes(alone):
    quantizer = make_quantizer()
    codebook = SharedCodebook(quantizer, alone)
    codes = [quantizer(as_grid(pass_of(0, micro_batch))).codes.numpy().ravel() for micro_batch in (0, 1)]
    found = codebook.update()
    shares = np.bincount(np.concatenate(codes)) / 14
    shares = shares[shares > 0]
    assert found.item() == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-12)
    assert 1 < found < 3.5


def test_a_pass_is_learned_once(alone):
    quantizer = make_quantizer()
    codebook = SharedCodebook(quantizer, alone)
    quantizer(as_grid(pass_of(0, 0)))
    assert codebook.update() is not None
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    assert codebook.update() is None, "nothing was quantized since"
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_passes_in_eval_mode_teach_nothing(alone):
    quantizer = make_quantizer()
    codebook = SharedCodebook(quantizer, alone)
    quantizer.eval()(as_grid(pass_of(0, 0)))
    assert codebook.update() is None
