"""Which images a step sees: a seeded permutation per epoch, the same whatever it is cut into."""

import pytest

from isic_vq.training.feed import EpochBatches
from isic_vq.training.processes import TrainingError


def epoch_of(batches, epoch, start=0):
    batches.epoch, batches.start = epoch, start
    return list(batches)


def test_an_epoch_is_a_permutation_in_whole_batches():
    batches = EpochBatches(num_items=11, batch_size=3, seed=0)
    for epoch in range(4):
        drawn = epoch_of(batches, epoch)
        assert [len(batch) for batch in drawn] == [3, 3, 3] == [3] * len(batches)
        flat = sum(drawn, [])
        assert len(set(flat)) == 9, "no image twice in an epoch"
        assert set(flat) <= set(range(11))
    assert {i for epoch in range(20) for i in sum(epoch_of(batches, epoch), [])} == set(range(11)), (
        "the two images that an epoch leaves out are others each time"
    )


def test_epochs_and_seeds_differ_and_repeat():
    batches, other = (EpochBatches(num_items=32, batch_size=4, seed=seed) for seed in (0, 1))
    assert epoch_of(batches, 0) != epoch_of(batches, 1)
    assert epoch_of(batches, 0) != epoch_of(other, 0)
    assert epoch_of(batches, 0) == epoch_of(EpochBatches(32, 4, 0), 0), (
        "the order depends on (seed, epoch) alone"
    )


@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_an_epoch_resumes_at_its_start(start):
    batches = EpochBatches(num_items=12, batch_size=4, seed=0)
    assert epoch_of(batches, 5, start) == epoch_of(batches, 5)[start:]


def test_an_epoch_of_parts_resumes_at_a_whole_batch():
    batches = EpochBatches(num_items=12, batch_size=4, seed=0, micro_batches=2)
    assert epoch_of(batches, 5, start=1) == epoch_of(batches, 5)[2:], (
        "start counts optimizer steps, not parts"
    )


@pytest.mark.parametrize(
    ("micro_batches", "world"), [(1, 1), (2, 1), (1, 2), (2, 2), (3, 2), (2, 3), (12, 1), (1, 12), (3, 4)]
)
def test_parts_in_sample_order_are_the_whole_batches(micro_batches, world):
    """Sample order is micro-batch by micro-batch, and within one process by process."""
    whole = EpochBatches(num_items=40, batch_size=12, seed=3)
    parts = [EpochBatches(40, 12, 3, micro_batches, world, rank) for rank in range(world)]
    assert [len(part) for part in parts] == [3 * micro_batches] * world
    assert {part.batches_per_epoch for part in parts} == {whole.batches_per_epoch} == {3}
    for epoch in (0, 7):
        drawn = [epoch_of(part, epoch) for part in parts]
        assert {len(indices) for own in drawn for indices in own} == {12 // (micro_batches * world)}
        for step, batch in enumerate(epoch_of(whole, epoch)):
            joined = [
                index
                for micro_batch in range(micro_batches)
                for own in drawn
                for index in own[step * micro_batches + micro_batch]
            ]
            assert joined == batch


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(TrainingError, match="3 images, fewer than one batch of 4: lower loop.batch_size"):
        EpochBatches(num_items=3, batch_size=4, seed=0)


@pytest.mark.parametrize(
    ("micro_batches", "world", "message"),
    [
        (
            3,
            1,
            "loop.batch_size is 10: expected a multiple of 3, 3 accumulated parts for each of 1 processes",
        ),
        (
            1,
            4,
            "loop.batch_size is 10: expected a multiple of 4, 1 accumulated parts for each of 4 processes",
        ),
        (
            2,
            3,
            "loop.batch_size is 10: expected a multiple of 6, 2 accumulated parts for each of 3 processes",
        ),
        (20, 1, "loop.batch_size is 10: expected a multiple of 20"),
    ],
)
def test_batch_that_cannot_be_cut_evenly_is_refused_with_the_numbers(micro_batches, world, message):
    with pytest.raises(TrainingError, match=message):
        EpochBatches(num_items=40, batch_size=10, seed=0, micro_batches=micro_batches, world=world)


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_the_loop_feeds_each_epoch_in_its_permutation(make_trainer, accumulation_steps):
    trainer = make_trainer(max_steps=3, batch_size=4, accumulation_steps=accumulation_steps)
    trainer.train()
    x = trainer.task.train_set.tensors[0].flatten()
    batches = EpochBatches(10, 4, 0, accumulation_steps)
    expected = [x[batch].tolist() for epoch in (0, 1) for batch in epoch_of(batches, epoch)]
    assert trainer.task.seen == expected[: 3 * accumulation_steps]
