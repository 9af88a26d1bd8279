"""The training loop: optimizer steps, validation, checkpoints, metrics. It knows nothing of images or codes.

What is trained is a `Task`. Both stages share this loop; their losses and metrics live in their own files.
Every random choice of the data (order, views) is a function of (seed, epoch or step), so that a resumed run
continues exactly where the interrupted one stood.
"""

import json
import logging
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from isic_vq.files import write_atomically
from isic_vq.training.averaging import AveragedParameters
from isic_vq.training.checkpoints import CheckpointError, Checkpoints, Progress
from isic_vq.training.recipe import LoopRecipe

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on: a loss that is not finite, or a run folder that is taken."""


class InterruptedTraining(KeyboardInterrupt):
    """SIGINT or SIGTERM ended the run after a checkpoint was saved."""


class Task(Protocol):
    """What the loop asks of a stage."""

    averages_directly: bool  # averaged parameters can be validated as they are (no statistics to re-estimate)

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    @property
    def train_set(self) -> Dataset:
        """What it is trained on; has a length."""

    def collate(self, items: list[Any]) -> dict[str, Any]:
        """Join items of `train_set` into a batch; batch["size"] tells how many images it holds."""

    def before_step(self, step: int) -> None:
        """Prepare for a step, in every process."""

    def losses(self, model: nn.Module, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Scalars of a batch; `loss` is the one that is minimised."""

    def validate(self) -> dict[str, float]:
        """Validation metrics of `model` as it is; `loss` is the one that selects."""

    def save(self, folder: Path) -> None:
        """Save `model` for others to load."""


class EpochBatches(Sampler[list[int]]):
    """Batches of a seeded permutation per epoch; the last incomplete one is dropped.

    `epoch` and `start` are set by the loop before each pass: the position in the data is two integers.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int):
        if num_items < batch_size:
            raise TrainingError(
                f"the training set has {num_items} images, fewer than one batch of {batch_size}: lower loop.batch_size"
            )
        self.num_items, self.batch_size, self.seed, self.drop_last = num_items, batch_size, seed, True
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.num_items // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(self.epoch,)))
        permutation = order.permutation(self.num_items).tolist()
        for batch in range(self.start, len(self)):
            yield permutation[batch * self.batch_size : (batch + 1) * self.batch_size]


def learning_rate_scale(step: int, warmup_steps: int, max_steps: int) -> float:
    """Factor on the peak learning rate: linear warm-up, then half a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps)))


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets, so that the loop can save before it ends."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # only the main thread may set handlers
        return
    old = {s: signal.signal(s, lambda *_: event.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class MetricLog:
    """metrics.jsonl and the trackers: one record per optimizer step, one per epoch."""

    def __init__(self, path: Path, accelerator: Accelerator):
        self.path, self.accelerator = path, accelerator

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the records past a step, and a last line that a killed run left half-written; return the others."""
        if not self.accelerator.is_main_process or not self.path.exists():
            return []
        lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_atomically(self.path, "".join(kept).encode())
        return [json.loads(line) for line in kept]

    def write(self, kind: str, step: int, epoch: int, values: dict[str, float]) -> None:
        """Append a record and hand it to the trackers."""
        if not self.accelerator.is_main_process:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **values}) + "\n")
        if self.accelerator.trackers:
            self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)


class Trainer:
    """One run of a task in one folder.

    Args:
        task: what is trained.
        recipe: how.
        run_dir: gets `metrics.jsonl`, `checkpoints/` and `best/`.
        settings: flat settings shown by the trackers.
    """

    def __init__(self, task: Task, recipe: LoopRecipe, run_dir: Path, settings: dict[str, Any]):
        self.task, self.recipe, self.run_dir = task, recipe, run_dir
        missing = set(recipe.trackers) - {tracker.value for tracker in get_available_trackers()}
        if missing:
            raise TrainingError(
                f"loop.trackers has {sorted(missing)}, not installed here: pip install 'isic-vq[trackers]'"
            )
        set_seed(recipe.seed)
        probe = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        use_bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and native_bf16(probe))
        self.accelerator = Accelerator(
            mixed_precision="bf16" if use_bf16 else "no",
            log_with=recipe.trackers or None,
            project_dir=str(run_dir),
            dataloader_config=DataLoaderConfiguration(split_batches=True, even_batches=False),
            # BatchNorm buffers stay each process's own: broadcasting rank 0's would hide a difference.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        if self.accelerator.num_processes > 1:
            raise TrainingError(
                f"training was started in {self.accelerator.num_processes} processes: this version trains in one, "
                "because codebooks are not yet kept equal across processes"
            )
        if recipe.trackers:
            scalars = (bool, int, float, str)  # all that TensorBoard takes
            shown = {name: v if isinstance(v, scalars) else str(v) for name, v in settings.items()}
            self.accelerator.init_trackers(recipe.project, config=shown)
        optimizer = torch.optim.AdamW(
            [p for p in task.model.parameters() if p.requires_grad],
            lr=recipe.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=recipe.weight_decay,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_scale(step, recipe.warmup_steps, recipe.max_steps)
        )
        self.batches = EpochBatches(len(task.train_set), recipe.batch_size, recipe.seed)  # type: ignore[arg-type]
        loader = DataLoader(
            task.train_set,
            batch_sampler=self.batches,
            collate_fn=task.collate,
            num_workers=recipe.num_workers,
            generator=torch.Generator(),  # its own, so that starting an epoch draws nothing from the global one
            pin_memory=self.accelerator.device.type == "cuda",
        )
        self.model, self.optimizer, self.loader = self.accelerator.prepare(task.model, optimizer, loader)
        # Not prepared: accelerate would step it once per process.
        self.scheduler = scheduler
        self.accelerator.register_for_checkpointing(scheduler)
        self.averaged = AveragedParameters(task.model, recipe.average_decay) if recipe.average_decay else None
        self.checkpoints = Checkpoints(run_dir / "checkpoints", recipe.keep_checkpoints)
        self.log = MetricLog(run_dir / "metrics.jsonl", self.accelerator)
        self.progress = Progress()
        self.epoch_values: list[dict[str, float]] = []  # of the current epoch's steps

    def resume(self) -> None:
        """Restore the newest checkpoint of the run folder."""
        self.progress = self.checkpoints.load_newest(self.accelerator, self.averaged)
        kept = self.log.rewind(self.progress.step)
        self.epoch_values = [
            {name: value for name, value in record.items() if name not in ("kind", "step", "epoch")}
            for record in kept
            if record["kind"] == "batch" and record["epoch"] == self.progress.epoch
        ]
        logger.info("resumed at step %d", self.progress.step)

    def train(self) -> None:
        """Train to the end of the recipe, or until validation stops improving.

        Raises:
            TrainingError: the loss is not finite.
            InterruptedTraining: a signal asked to stop; a checkpoint was saved.
            CheckpointError: a checkpoint could not be written.
        """
        progress, recipe = self.progress, self.recipe
        bar = tqdm(
            total=recipe.max_steps,
            initial=progress.step,
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        )
        with stop_requests() as stop, bar:
            while not self._is_finished():
                self._run_epoch(bar, stop)
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.accelerator, self.averaged, progress)
        self.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """End the trackers' run."""
        self.accelerator.end_training()

    def _is_finished(self) -> bool:
        progress, recipe = self.progress, self.recipe
        if 0 < recipe.patience <= progress.validations_since_best:
            return True
        # A run stopped after its last step still owes that epoch's validation.
        return progress.step >= recipe.max_steps and progress.batch == 0

    def _run_epoch(self, bar: tqdm, stop: threading.Event) -> None:
        progress, recipe = self.progress, self.recipe
        self.batches.epoch, self.batches.start = progress.epoch, progress.batch
        started = time.perf_counter()
        self.model.train()
        for batch in self.loader:
            if progress.step >= recipe.max_steps:
                break
            values = self._step(batch)
            now = time.perf_counter()
            values["images_per_second"], started = batch["size"] / (now - started), now
            self.epoch_values.append(values)
            self.log.write("batch", progress.step, progress.epoch, values)
            bar.update()
            bar.set_postfix(loss=f"{values['loss']:.4f}", images_per_s=f"{values['images_per_second']:.1f}")
            if stop.is_set():
                self._stop()
            if progress.step % recipe.save_every == 0:
                self._save()
        epoch, progress.epoch, progress.batch = progress.epoch, progress.epoch + 1, 0
        sums: dict[str, float] = defaultdict(float)
        for values in self.epoch_values:
            for name, value in values.items():
                sums[name] += value
        record = {f"train/{name}": sums[name] / len(self.epoch_values) for name in sums if name != "lr"}
        self.epoch_values = []
        if progress.epoch % recipe.eval_every == 0 or progress.step >= recipe.max_steps:
            record |= self._validate()
        self.log.write("epoch", progress.step, epoch, record)

    def _step(self, batch: dict[str, Any]) -> dict[str, float]:
        """One optimizer step; returns its losses as numbers."""
        progress = self.progress
        self.task.before_step(progress.step)
        with self.accelerator.autocast():
            losses = self.task.losses(self.model, batch, progress.step)
        loss = losses["loss"]
        if not torch.isfinite(loss):
            saved = self.checkpoints.list()
            raise TrainingError(
                f"the loss is {loss.item()} at step {progress.step}; the last good checkpoint is "
                f"{saved[-1].name if saved else 'none'}. Lower loop.learning_rate or set loop.precision=fp32"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update(self.task.model)
        progress.step += 1
        progress.batch += 1
        numbers: dict[str, float] = {name: value.item() for name, value in losses.items()}
        return {**numbers, "lr": float(learning_rate), "grad_norm": float(norm)}

    def _validate(self) -> dict[str, float]:
        """Validate raw and, where they stand alone, averaged parameters; keep the best model."""
        record: dict[str, float] = {}
        candidates: list[tuple[str, Any]] = [("validation", nullcontext())]
        if self.averaged is not None and self.task.averages_directly:
            candidates.append(("averaged", self.averaged.swapped_in(self.task.model)))
        improved = False
        for name, context in candidates:
            with context:
                metrics = self.task.validate()
                record |= {f"{name}/{key}": value for key, value in metrics.items()}
                if self.progress.best_loss is None or metrics["loss"] < self.progress.best_loss:
                    self.progress.best_loss, self.progress.best_step = metrics["loss"], self.progress.step
                    improved = True
                    if self.accelerator.is_main_process:
                        self.task.save(self.run_dir / "best")
        self.progress.validations_since_best = 0 if improved else self.progress.validations_since_best + 1
        self.model.train()
        return record

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.accelerator, self.averaged, self.progress)
        self.accelerator.wait_for_everyone()

    def _stop(self) -> None:
        self._save()
        raise InterruptedTraining(
            f"stopped at step {self.progress.step}; a checkpoint was saved. Continue with the same command and --resume"
        )


__all__ = ["CheckpointError", "InterruptedTraining", "Task", "Trainer", "TrainingError"]
