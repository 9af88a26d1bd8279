"""What tests of several processes run to see which images each of them is fed; started by torchrun.

Every image that a step saw, and every image of an evaluation, goes into a file of this process, line by line.
"""

import itertools
import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from datasets import Image
from torch import nn
from torch.utils.data import DataLoader

from isic_vq.data.loading import collate, decoded_item, iter_batches
from isic_vq.data.sources import find_source
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.training.image_task import ImageTask, open_images
from isic_vq.training.load import load_recipe
from isic_vq.training.loop import Trainer
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import LoopRecipe, VQVAERecipe
from isic_vq.training.run import Run

SIZE = 32


class EpochOverError(Exception):
    """The epoch to be watched has ended."""


class WatchedTask(ImageTask):
    """Fits the mean colour, and notes down which images each step sees."""

    averages_directly = True

    def __init__(self, recipe, processor, log):
        train_set, validation_set, _ = open_images(recipe.data, processor)
        super().__init__(nn.Linear(1, 1), processor, train_set, validation_set, recipe)
        self.log, self.step_ids = log, []
        self.row_ids = train_set.records["isic_id"] if hasattr(train_set, "records") else None

    def compiled_parts(self):
        return []

    def collate(self, items):
        ids = [item["isic_id"] if self.row_ids is None else self.row_ids[item["index"]] for item in items]
        return {**collate(items, self.views), "size": len(items), "ids": ids}

    def before_epoch(self, epoch):
        super().before_epoch(epoch)
        if epoch == 1:
            raise EpochOverError

    def before_step(self, step):
        self.step_ids = []

    def losses(self, model, batch, step):
        self.step_ids += batch["ids"]
        mean = batch["pixel_values"].mean((1, 2, 3))[:, None]
        return {"loss": (model(mean) - 1).square().mean()}

    def after_step(self):
        self.log.write(json.dumps(self.step_ids) + "\n")
        self.log.flush()
        return {}

    def validate(self):
        return {"loss": 0.0}

    def save(self, folder):
        folder.mkdir(exist_ok=True)


def watch_training(folder, data, loop):
    """Train an epoch, or the rest of the one that was interrupted in this folder."""
    recipe = load_recipe(VQVAERecipe, None, [*data, *loop, "loop.max_steps=1000000", "loop.precision=fp32"])
    processes = Processes(recipe.loop, folder)
    resume = any((folder / "checkpoints").glob("step-*"))
    with (folder / f"seen-{processes.rank}.jsonl").open("a") as log:
        task = WatchedTask(recipe, IsicVQImageProcessor(size=SIZE), log)
        trainer = Trainer(task, recipe.loop, Run(folder, "0123abcd"), processes, settings={})
        if resume:
            trainer.resume()
            log.write(json.dumps({"resumed": trainer.progress.step}) + "\n")
        with suppress(EpochOverError):
            trainer.train()


def decoded_ids(rows):
    """Decode rows in a loading process; returns their ids."""
    processor = IsicVQImageProcessor(size=SIZE)
    items = [decoded_item(row, processor) for row in rows]
    return [row["isic_id"] for row, item in zip(rows, items, strict=True) if "error" not in item]


def watch_evaluation(folder, uri, stream, num_workers):
    """Read this process's share of a source once."""
    processes = Processes(LoopRecipe(precision="fp32"), folder)
    source = find_source(uri)
    rank, world = processes.rank, processes.world
    records = source.stream(rank, world) if stream else source.dataset().shard(world, rank)
    if num_workers:
        undecoded = records.cast_column("image", Image(decode=False))
        batches = DataLoader(undecoded, 64, num_workers=num_workers, collate_fn=decoded_ids)
    else:
        batches = (batch["isic_ids"] for batch in iter_batches(records, IsicVQImageProcessor(size=SIZE), 64))
    ids = list(itertools.chain.from_iterable(batches))
    (folder / f"read-{processes.rank}.json").write_text(json.dumps(ids))


def main(jobs):
    """Run jobs: {"folder", "data", "loop"} to train, {"folder", "uri", "stream", "num_workers"} to evaluate."""
    torch.set_num_threads(1)
    for job in jobs:
        folder = Path(job["folder"])
        folder.mkdir(parents=True, exist_ok=True)
        if "uri" in job:
            watch_evaluation(folder, job["uri"], job["stream"], job["num_workers"])
        else:
            watch_training(folder, job["data"], job["loop"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
