"""The training loop: optimizer steps, validation, checkpoints, metrics; independent of images and codes.

What is trained is a `Task`. All stages share this loop; their losses and metrics live in their own files. Every
random choice of the data (order, views) is a function of (seed, epoch, item), so that a resumed run continues
exactly where the interrupted one stood, and a run in several processes does what a run in one does.
"""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from tqdm import tqdm

from isic_vq.locks import hold
from isic_vq.training.averaging import AveragedParameters
from isic_vq.training.checkpoints import Checkpoints, Progress, TrainingState
from isic_vq.training.feed import Batch
from isic_vq.training.processes import Processes, TrainingError
from isic_vq.training.recipe import LoopRecipe, Recipe
from isic_vq.training.run import Run, open_run
from isic_vq.training.task import Task
from isic_vq.training.tracking import MetricLog

logger = logging.getLogger(__name__)

PROFILED_STEPS = 5  # after three that warm up
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


class InterruptedTraining(KeyboardInterrupt):
    """SIGINT or SIGTERM ended the run after a checkpoint was saved."""


def learning_rate_scale(step: int, warmup_steps: int, max_steps: int) -> float:
    """Factor on the peak learning rate: linear warm-up, then half a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps)))


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a device or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # torch's CPU allocator, C++ containers, cuBLAS and cuDNN raise a RuntimeError: only its text tells it from others.
    texts = ("allocate memory", "bad_alloc", "out of memory", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def memory_gib(device: torch.device) -> float:
    """Peak memory of the process on its GPU, or its present resident memory on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def run_stage(open_task: Callable[[AnyRecipe], Task], recipe: AnyRecipe, resume: bool) -> Any:
    """Train what a recipe asks for; the main process returns what `Task.conclude` does, the others None.

    The main process locks the run's folder for all, as two runs never write to one.
    """
    folder = Path(recipe.output_dir)
    with hold(folder) if os.environ.get("RANK", "0") == "0" else nullcontext():
        task = open_task(recipe)
        processes = Processes(recipe.loop, folder, task.idle_parameters)
        run = open_run(recipe, task.sources, resume, processes)
        trainer = Trainer(task, recipe.loop, run, processes, {"stage": recipe.stage, **task.settings})
        if run.resumes:
            trainer.resume()
        trainer.train()
        result = task.conclude(trainer) if processes.is_main else None
        trainer.finish()
        return result


class Trainer:
    """One run of a task in one folder, which gets `metrics.jsonl`, `checkpoints/` and `best/`."""

    def __init__(
        self, task: Task, recipe: LoopRecipe, run: Run, processes: Processes, settings: dict[str, Any]
    ):
        self.task, self.recipe, self.run, self.processes = task, recipe, run, processes
        self.log = MetricLog(run.folder, run.identifier, recipe, processes, settings)
        set_seed(recipe.seed + processes.rank)  # dropout must differ from process to process
        if recipe.compile:
            for part in task.compiled_parts():
                part.compile()
        if processes.world > 1 and processes.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(task.model)  # in place: the model itself is no such layer
        optimizer = torch.optim.AdamW(
            [p for p in task.model.parameters() if p.requires_grad],
            lr=recipe.learning_rate,
            betas=(recipe.beta1, 0.99),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_scale(step, recipe.warmup_steps, recipe.max_steps)
        )
        self.feed = task.feed(recipe, processes)
        # The scheduler is not prepared: accelerate would step it once per process.
        self.model, self.optimizer = processes.accelerator.prepare(task.model, optimizer)
        decay = recipe.average_decay
        self.averaged = AveragedParameters(task.model, decay, not task.fine_tunes) if decay else None
        state = TrainingState(task.model, self.optimizer, self.scheduler, self.averaged)
        self.checkpoints = Checkpoints(run.folder / "checkpoints", recipe.keep_checkpoints, processes, state)
        self.progress = Progress()
        self.epoch_values: list[dict[str, float]] = []  # of the current epoch's steps
        self.stop = threading.Event()
        task.begin(processes)

    def resume(self) -> None:
        self.progress = self.checkpoints.load_newest()
        self.feed.restore(self.checkpoints.feed)
        logger.info("resumed at step %d", self.progress.step)

    def train(self) -> None:
        """Train to the end of the recipe, or until validation stops improving.

        Raises:
            TrainingError: the loss is not finite, the data or the memory ran out, another process is gone.
            InterruptedTraining: a signal asked to stop; a checkpoint was saved.
        """
        total, done, hidden = self.recipe.max_steps, self.progress.step, not self.processes.is_main
        with (
            stop_requests() as self.stop,
            tqdm(total=total, initial=done, unit="step", disable=hidden, dynamic_ncols=True) as bar,
            self.processes.watched(),
            self._explained(),
            self._profiler() as profiler,
        ):
            for values in self.steps():
                bar.update()
                loss, speed = f"{values['loss']:.4f}", f"{values['images_per_second']:.1f}"
                bar.set_postfix(loss=loss, images_per_s=speed)
                if profiler is not None:
                    profiler.step()

    def steps(self) -> Iterator[dict[str, float]]:
        """Train step by step; yields each optimizer step's record after the checkpoint that may be due."""
        progress, recipe = self.progress, self.recipe
        self.epoch_values = [
            {name: value for name, value in record.items() if name not in ("kind", "step", "epoch")}
            for record in self.log.begin(progress.step, progress.epoch)
            if record["kind"] == "batch" and record["epoch"] == progress.epoch
        ]
        # A run that was stopped after its last step has not yet validated that epoch.
        while (progress.step < recipe.max_steps or progress.batch > 0) and not (
            0 < recipe.patience <= progress.validations_since_best
        ):
            yield from self._epoch()
        self._save()

    def finish(self) -> None:
        """End the trackers' run and leave the group of processes."""
        # DDP goes before the group does. As its last owner it would end the group's threads while it holds Python's
        # lock, which one of them may be waiting for: the process would then never end.
        self.model = self.task.model
        self.processes.accelerator.free_memory()
        self.log.finish()

    def _epoch(self) -> Iterator[dict[str, float]]:
        """Train the rest of an epoch, then validate."""
        progress, recipe = self.progress, self.recipe
        self.task.before_epoch(progress.epoch)
        self.model.train()
        steps = self.feed.epoch(progress.epoch, progress.batch)
        while progress.step < recipe.max_steps:
            started = time.perf_counter()
            micro_batches, num_images = self._fetch(steps)
            if not num_images:
                break
            fetched = time.perf_counter()
            values = self._step(micro_batches, num_images)
            ended = time.perf_counter()
            values["data_seconds"], values["compute_seconds"] = fetched - started, ended - fetched
            values["images_per_second"] = num_images / (ended - started)
            values["memory_gib"] = memory_gib(self.processes.device)
            self.epoch_values.append(values)
            self.log.write("batch", progress.step, progress.epoch, values)
            if progress.step % recipe.save_every == 0:
                self._save()
            yield values
        if self.processes.agree(self.stop.is_set()):
            self._stop()
        if progress.batch == 0:
            raise TrainingError(
                f"the training data gave process {self.processes.rank} of {self.processes.world} or another one no "
                f"whole share of a batch of {recipe.batch_size}: lower loop.batch_size or loop.num_workers"
            )
        names = dict.fromkeys(name for values in self.epoch_values for name in values if name != "lr")
        columns = {name: [values[name] for values in self.epoch_values if name in values] for name in names}
        record = {f"train/{name}": sum(column) / len(column) for name, column in columns.items()}
        record["train/dropped_images"] = float(self.feed.num_items - progress.batch * recipe.batch_size)
        epoch, progress.epoch, progress.batch, self.epoch_values = progress.epoch, progress.epoch + 1, 0, []
        if progress.epoch % recipe.eval_every == 0 or progress.step >= recipe.max_steps:
            record |= self._validate()
        self.log.write("epoch", progress.step, epoch, record)

    def _fetch(self, steps: Iterator[tuple[Batch, ...]]) -> tuple[tuple[Batch, ...], int]:
        """This process's micro-batches of a step, and the images of all processes; 0 if some process has none left."""
        micro_batches: tuple[Batch, ...] = ()
        failure = None
        try:
            micro_batches = next(steps, ())
            for batch in micro_batches:
                self.task.check(batch)
        except Exception as error:  # data sources raise all kinds
            failure = error
        size = sum(batch["size"] for batch in micro_batches)
        flags = self.stop.is_set(), failure is not None, not micro_batches, size
        totals = self.processes.sum(torch.tensor(flags, dtype=torch.float64))
        stop, failures, ended, num_images = totals.tolist()
        if stop:
            self._stop()
        if failures:
            if failure is not None and is_out_of_memory(failure):
                raise failure  # saving would need memory, too
            self._save()
            # Of an error in a loader's process, the last line: the others are its traceback.
            reason = (
                (str(failure).strip() or repr(failure)).splitlines()[-1] if failure else "in another process"
            )
            raise TrainingError(
                f"the images of step {self.progress.step} could not be loaded ({reason}); a checkpoint was saved "
                "there. Repair the data and run the same command with --resume"
            ) from failure
        return micro_batches, 0 if ended else int(num_images)

    def _step(self, micro_batches: tuple[Batch, ...], num_images: int) -> dict[str, float]:
        """One optimizer step; returns its losses as numbers, means over the images of all processes."""
        progress, accelerator = self.progress, self.processes.accelerator
        sums: dict[str, Tensor] = {}
        self.task.before_step(progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        for index, batch in enumerate(micro_batches):
            share = batch["size"] / num_images
            is_last = index == len(micro_batches) - 1
            with nullcontext() if is_last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    losses = self.task.losses(self.model, batch, progress.step)
                # DDP takes the mean over processes; shares of the whole step add up to one.
                accelerator.backward(losses["loss"] * (share * self.processes.world))
            for name, value in losses.items():
                part = value.detach() * share
                sums[name] = sums[name] + part if name in sums else part
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.max_grad_norm)
        totals = self.processes.sum(torch.stack([value.float() for value in sums.values()])).tolist()
        numbers = dict(zip(sums, totals, strict=True))
        if not (math.isfinite(numbers["loss"]) and math.isfinite(norm)):  # before they reach the weights
            loss = numbers["loss"]
            problem = f"gradient's norm is {float(norm)}" if math.isfinite(loss) else f"loss is {loss}"
            raise TrainingError(
                f"the {problem} at step {progress.step}; the last good checkpoint is {self.checkpoints.newest_name()}. Lower "
                "loop.learning_rate or set loop.precision=fp32"
            )
        numbers |= {"lr": float(self.scheduler.get_last_lr()[0]), "grad_norm": float(norm)}
        self.optimizer.step()
        numbers |= {name: value.item() for name, value in self.task.after_step().items()}
        self.scheduler.step()
        if self.averaged is not None:
            self.averaged.update(self.task.model)
        progress.step += 1
        progress.batch += 1
        return numbers

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn torch's errors for lack of memory and a killed loading process into ones that name the way out."""
        try:
            yield
        except TrainingError:
            raise  # has been explained
        except (RuntimeError, MemoryError) as error:
            step, last, recipe = self.progress.step, self.checkpoints.newest_name(), self.recipe
            if is_out_of_memory(error):
                at_once = recipe.batch_size // (recipe.accumulation_steps * self.processes.world)
                raise TrainingError(
                    f"out of memory at step {step} with {at_once} images at once on {self.processes.device.type}; the "
                    f"last good checkpoint is {last}. Raise loop.accumulation_steps (now {recipe.accumulation_steps}), "
                    "which keeps the batch, lower loop.batch_size, or set loop.precision=bf16"
                ) from error
            if "DataLoader worker" in str(error):
                raise TrainingError(
                    f"a process that loads images was killed at step {step} ({str(error).splitlines()[-1]}); the last "
                    f"good checkpoint is {last}. Lower loop.num_workers (now {recipe.num_workers}) if memory is short, "
                    "and run the same command with --resume"
                ) from error
            raise

    def _validate(self) -> dict[str, float]:
        """Validate raw and, where they stand alone, averaged parameters; keep the best model.

        The main process measures, the others wait: no collective runs inside a validation.
        """
        record: dict[str, float] = {}
        progress, task = self.progress, self.task
        if self.processes.is_main:
            candidates: dict[str, Any] = {"validation": nullcontext()}
            if self.averaged is not None and task.averages_directly:
                candidates["averaged"] = self.averaged.swapped_in(task.model)
            progress.validations_since_best += 1
            for name, swapped_in in candidates.items():
                with swapped_in:
                    metrics = task.validate()
                    record |= {f"{name}/{key}": value for key, value in metrics.items()}
                    loss = task.selection(metrics)
                    if progress.best_loss is None or loss < progress.best_loss:
                        progress.best_loss, progress.best_step = loss, progress.step
                        progress.validations_since_best = 0
                        task.save(self.run.folder / "best")
            if self.log.has_trackers:
                self.log.show(progress.step, task.pictures())
        record, fields = self.processes.from_main((record, vars(progress)))
        vars(progress).update(fields)
        self.model.train()
        return record

    def _save(self) -> None:
        self.checkpoints.save(self.progress, self.feed.state(self.progress.batch))

    def _stop(self) -> None:
        self._save()
        raise InterruptedTraining(
            f"stopped at step {self.progress.step}; a checkpoint was saved. Continue with the same command and --resume"
        )

    @contextmanager
    def _profiler(self) -> Iterator[torch.profiler.profile | None]:
        """With `loop.profile`, a profiler whose trace of a few steps goes to `profile/` in the run's folder."""
        if not self.recipe.profile:
            yield None
            return
        folder = self.run.folder / "profile"
        folder.mkdir(exist_ok=True)
        path = folder / f"steps-process{self.processes.rank}.json"
        with torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=2, warmup=1, active=PROFILED_STEPS, repeat=1),
            on_trace_ready=lambda profile: profile.export_chrome_trace(str(path)),
            profile_memory=True,
        ) as profiler:
            yield profiler
