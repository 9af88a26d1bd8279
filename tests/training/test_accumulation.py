"""A batch in parts is the batch: gradients, codebook and reported losses are those of all its images at once."""

import math

import pytest
import torch
from line_task import LineTask
from run_folder import records
from torch import nn
from torch.utils.data import TensorDataset

from isic_vq.training.loop import Trainer
from isic_vq.training.processes import Processes
from isic_vq.training.run import Run


class ExactLine(LineTask):
    """Without BatchNorm and dropout, and in double precision; an item that is not a number is left out, as corrupt."""

    def __init__(self, corrupt=()):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        x = torch.linspace(-1, 1, 32, dtype=torch.float64)[:, None]
        x[list(corrupt)] = math.nan
        self.train_set = TensorDataset(x, 2 * x)

    def collate(self, items):
        return super().collate([(x, y) for x, y in items if not x.isnan()])


def assert_same(found, expected, tolerance):
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def run_line(make_trainer, parts, corrupt=()):
    trainer = make_trainer(
        f"parts-{parts}",
        ExactLine(corrupt),
        max_steps=6,
        batch_size=8,
        accumulation_steps=parts,
        eval_every=100,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("corrupt", [(), (3, 4, 9, 17, 30)], ids=["all sound", "some corrupt"])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_train_as_the_whole_batch(make_trainer, parts, corrupt):
    whole, cut = (run_line(make_trainer, n, corrupt) for n in (1, parts))
    sizes = {len(x) for x in cut.task.seen}
    assert (len(cut.task.seen), max(sizes)) == (6 * parts, 8 // parts), "premise: the batch came in parts"
    assert (len(sizes) > 1) == bool(corrupt), "premise: parts are of unequal size where images are corrupt"
    assert_same(cut.task.model.state_dict(), whole.task.model.state_dict(), 1e-12)
    assert_same(cut.averaged.state_dict(), whole.averaged.state_dict(), 1e-12)
    for found, expected in zip(
        records(cut.run.folder, "batch"), records(whole.run.folder, "batch"), strict=True
    ):
        for name in ("loss", "double_loss", "grad_norm", "lr"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6), name


def run_vqvae(make_vqvae_task, folder, parts, *overrides):
    """Five steps with 8 images each; the codebook starts at step 1."""
    loop = [
        "loop.batch_size=8",
        "loop.max_steps=5",
        f"loop.accumulation_steps={parts}",
        "loop.eval_every=100",
    ]
    task = make_vqvae_task(*loop, "codebook_warmup_steps=1", *overrides)
    task.model.double()
    folder = folder / f"parts-{parts}"
    folder.mkdir()
    trainer = Trainer(
        task, task.recipe.loop, Run(folder, "0123abcd"), Processes(task.recipe.loop, folder), settings={}
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_tokenizer_and_codebook_learn_from_parts_what_they_learn_from_the_whole(
    make_vqvae_task, tmp_path, update
):
    overrides = ["model.norm=group", f"model.codebook_update={update}", "model.dead_code_threshold=8"]
    whole, cut = (run_vqvae(make_vqvae_task, tmp_path, parts, *overrides) for parts in (1, 2))
    assert whole.task.model.quantizer.num_updates == 4, "once a step, whatever it is cut into"
    # The loss itself is float32; halves of it are exact, so its gradient is the same to the last bit.
    assert_same(cut.task.model.state_dict(), whole.task.model.state_dict(), 1e-10)


def test_corrupt_image_in_one_part_leaves_the_mean_over_the_sound_ones(make_vqvae_task, tiny_run, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for path in tiny_run.images["train"].iterdir():
        (images / path.name).write_bytes(b"no image" if path.name == "003.png" else path.read_bytes())
    overrides = ["model.norm=group", f"data.train=folder:{images}", "data.max_corrupt_share=0.5"]
    whole, cut = (run_vqvae(make_vqvae_task, tmp_path, parts, *overrides) for parts in (1, 2))
    assert cut.task.skipped.num_skipped == whole.task.skipped.num_skipped > 1, (
        "premise: it was met in training"
    )
    assert_same(
        cut.task.model.state_dict(), whole.task.model.state_dict(), 1e-5
    )  # sevenths of a float32 loss


def test_batch_norm_sees_each_part_alone(make_vqvae_task, tmp_path):
    """What the recipe's docstring warns of: BatchNorm normalises a part by the part's own mean and variance."""
    whole, cut = (run_vqvae(make_vqvae_task, tmp_path, parts, "model.norm=batch") for parts in (1, 2))
    weights = [trainer.task.model.encoder.project.weight for trainer in (whole, cut)]
    assert (weights[0] - weights[1]).abs().max() > 1e-4
