"""The loop: where it stands in the data, when it saves, validates and stops, and that a resumed run is the same run."""

import json
import math
import os
import shutil
import signal
import time

import psutil
import pytest
import torch
from line_task import LineTask, interrupt_at
from run_folder import digests, records, scalars, untimed
from safetensors.torch import load_file

from isic_vq.models.modeling_pixelcnn import PixelCNNModel
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.training import prior as prior_stage
from isic_vq.training import vqvae as vqvae_stage
from isic_vq.training.load import load_recipe
from isic_vq.training.loop import (
    PROFILED_STEPS,
    InterruptedTraining,
    Trainer,
    TrainingError,
    learning_rate_scale,
)
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import LoopRecipe, PriorRecipe, VQVAERecipe
from isic_vq.training.run import Run

# Learning rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),
        (1, 0.5),
        (3, 1.0),
        (4, 1.0),
        (7, 0.75),
        (8, 0.5 * (1 + math.cos(4 / 9 * math.pi))),
        (13, 0.0),
    ],
)
def test_learning_rate_warms_up_linearly_and_falls_as_half_a_cosine(step, expected):
    # 4 steps of warm-up, then 9: a third of the way down the cosine is at 3/4, since cos(pi/3) = 1/2.
    assert learning_rate_scale(step, warmup_steps=4, max_steps=13) == pytest.approx(expected)


def test_learning_rate_without_warmup_starts_at_the_peak():
    assert learning_rate_scale(0, warmup_steps=0, max_steps=10) == 1.0
    assert learning_rate_scale(5, warmup_steps=0, max_steps=10) == pytest.approx(0.5)


def test_the_logged_learning_rate_is_the_schedules(make_trainer):
    trainer = make_trainer(max_steps=6, warmup_steps=2, learning_rate=0.1)
    trainer.train()
    logged = [record["lr"] for record in records(trainer.run.folder, "batch")]
    assert logged == pytest.approx([0.1 * learning_rate_scale(step, 2, 6) for step in range(6)])


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_a_checkpoint_and_names_the_step(make_trainer, number):
    task = LineTask()
    task.before = interrupt_at(3, number)
    trainer = make_trainer(task=task, save_every=100)
    before = signal.getsignal(number)
    with pytest.raises(InterruptedTraining, match="stopped at step 4; a checkpoint was saved.*--resume"):
        trainer.train()
    assert [path.name for path in trainer.checkpoints.list()] == ["step-00000004"]
    assert signal.getsignal(number) is before, "the process gets its own handlers back"


def test_interrupted_training_ends_a_program_as_ctrl_c_does():
    assert issubclass(InterruptedTraining, KeyboardInterrupt), "no `except Exception` may swallow it"


# Stop and resume


@pytest.fixture(scope="module")
def line_reference(tmp_path_factory):
    """An uninterrupted run of 13 steps."""
    folder = tmp_path_factory.mktemp("reference")
    loop = LoopRecipe(
        max_steps=13,
        batch_size=2,
        learning_rate=1e-2,
        warmup_steps=2,
        save_every=3,
        average_decay=0.5,
        precision="fp32",
    )
    trainer = Trainer(LineTask(), loop, Run(folder, "0123abcd"), Processes(loop, folder), settings={})
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [0, 3, 4, 5, 8, 12])
def test_stop_and_resume_is_the_uninterrupted_run_bit_for_bit(make_trainer, line_reference, step):
    """Stops at the first step, within an epoch, at its end (5 batches each), and after the last step."""
    task = LineTask()
    task.before = interrupt_at(step)
    stopped = make_trainer(task=task, max_steps=13)
    with pytest.raises(InterruptedTraining):
        stopped.train()
    torch.manual_seed(99)
    resumed = make_trainer(max_steps=13)
    resumed.resume()
    assert resumed.progress.step == step + 1
    resumed.train()
    for name, value in line_reference.task.model.state_dict().items():
        assert torch.equal(resumed.task.model.state_dict()[name], value), name
    for name, value in line_reference.averaged.state_dict().items():
        assert torch.equal(resumed.averaged.state_dict()[name], value), name
    assert resumed.progress == line_reference.progress
    assert digests(resumed.run.folder / "best") == digests(line_reference.run.folder / "best")
    assert untimed(records(resumed.run.folder)) == untimed(records(line_reference.run.folder))


def test_killed_run_resumes_from_its_last_checkpoint_to_the_same_end(make_trainer, line_reference):
    """A run that dies without notice has logged steps that no checkpoint holds."""

    class Killed(LineTask):
        def before_step(self, step):
            if step == 8:
                raise SystemExit

    killed = make_trainer(task=Killed(), max_steps=13)
    with pytest.raises(SystemExit):
        killed.train()
    with (killed.run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "batch", "step": 9, "lo')
    resumed = make_trainer(max_steps=13)
    resumed.resume()
    assert resumed.progress.step == 6
    resumed.train()
    assert untimed(records(resumed.run.folder)) == untimed(records(line_reference.run.folder))
    for name, value in line_reference.task.model.state_dict().items():
        assert torch.equal(resumed.task.model.state_dict()[name], value), name


def test_a_finished_run_resumes_to_nothing(make_trainer):
    trainer = make_trainer(max_steps=7)
    trainer.train()
    before = untimed(records(trainer.run.folder))
    again = make_trainer(max_steps=7)
    again.resume()
    again.train()
    assert again.task.seen == [], "no step past the end"
    assert untimed(records(trainer.run.folder)) == before


STAGES = {
    "vqvae": (vqvae_stage, "VQVAETask", VQVAERecipe, "train_vqvae"),
    "prior": (prior_stage, "PriorTask", PriorRecipe, "train_prior"),
}


@pytest.mark.parametrize("step", [0, 1, 3, 4, 5])
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_resumed_stage_writes_the_same_bytes(tiny_run, tmp_path, monkeypatch, stage, step):
    """Stops before and at the codebook's start (step 2), at an epoch's end (4 steps), within one, after the last."""
    module, task, recipe_class, train = STAGES[stage]
    recipe = load_recipe(recipe_class, tiny_run.configs[stage], [f"output_dir={tmp_path / 'run'}"])
    before_step, interrupt = getattr(module, task).before_step, interrupt_at(step)

    def interrupted_step(self, now):
        interrupt(now)
        before_step(self, now)

    with monkeypatch.context() as patch:
        patch.setattr(getattr(module, task), "before_step", interrupted_step)
        with pytest.raises(InterruptedTraining, match=f"stopped at step {step + 1}"):
            getattr(module, train)(recipe)
    torch.manual_seed(99)
    getattr(module, train)(recipe, resume=True)
    reference = getattr(tiny_run, stage)
    for part in ("best", "model", "arrays"):
        assert digests(tmp_path / "run" / part) == digests(reference / part), part
    assert digests(tmp_path / "run")["report.json"] == digests(reference)["report.json"]
    assert untimed(records(tmp_path / "run")) == untimed(records(reference))


# Validation, the best model, early stopping


def test_early_stopping_counts_validations_without_improvement(make_trainer):
    task = LineTask()
    task.averages_directly = False
    task.validation_losses = [3.0, 2.0, 2.5, 1.9, 2.0, 1.9, 1.95]
    trainer = make_trainer(task=task, max_steps=100, patience=3)
    trainer.train()
    assert task.validated == [3.0, 2.0, 2.5, 1.9, 2.0, 1.9, 1.95], "an equal loss is no improvement"
    assert trainer.progress.step == 7 * 5
    assert (trainer.progress.best_loss, trainer.progress.best_step) == (1.9, 4 * 5)


def test_without_patience_a_run_goes_to_its_end(make_trainer):
    task = LineTask()
    task.validation_losses = [1.0] + [2.0] * 20
    trainer = make_trainer(task=task, max_steps=20, patience=0)
    trainer.train()
    assert trainer.progress.step == 20


def test_best_is_the_model_of_the_lowest_validation_loss(make_trainer):
    class Remembering(LineTask):
        states: list = []

        def validate(self):
            self.states.append({name: value.clone() for name, value in self.model.state_dict().items()})
            return super().validate()

    task = Remembering()
    task.averages_directly = False
    task.validation_losses = [3.0, 1.0, 2.0]
    trainer = make_trainer(task=task, max_steps=15)
    trainer.train()
    saved = load_file(trainer.run.folder / "best" / "model.safetensors")
    for name, value in task.states[1].items():
        assert torch.equal(saved[name], value), name
    assert any(not torch.equal(task.states[1][name], task.states[2][name]) for name in saved)


@pytest.mark.parametrize(("losses", "weights"), [([2.0, 1.0], "averaged"), ([1.0, 2.0], "raw")])
def test_best_is_the_averaged_model_where_that_is_better(make_trainer, losses, weights):
    task = LineTask()
    task.validation_losses = list(losses)
    trainer = make_trainer(task=task, max_steps=5)
    trainer.train()
    saved = load_file(trainer.run.folder / "best" / "model.safetensors")
    expected = trainer.averaged.shadow if weights == "averaged" else dict(task.model.named_parameters())
    for name in trainer.averaged.shadow:
        assert torch.equal(saved[name], expected[name]), name
    (epoch,) = records(trainer.run.folder, "epoch")
    assert (epoch["validation/loss"], epoch["averaged/loss"]) == tuple(losses)


def test_validation_loss_is_logged_as_measured(make_trainer):
    task = LineTask()
    task.averages_directly = False
    trainer = make_trainer(task=task, max_steps=15)
    trainer.train()
    assert [record["validation/loss"] for record in records(trainer.run.folder, "epoch")] == task.validated, (
        "no smoothing, no averaging with earlier epochs"
    )
    assert len(set(task.validated)) == 3


def test_validation_every_other_epoch_and_always_at_the_end(make_trainer):
    trainer = make_trainer(max_steps=23, eval_every=2)
    trainer.train()
    validated = ["validation/loss" in record for record in records(trainer.run.folder, "epoch")]
    assert validated == [False, True, False, True, True], "the last, incomplete epoch is validated, too"


def test_training_goes_on_in_train_mode_after_a_validation(make_trainer):
    modes = []
    task = LineTask()
    task.before = lambda step: modes.append(task.model.training)
    make_trainer(task=task, max_steps=12).train()
    assert modes == [True] * 12


# metrics.jsonl


def test_metrics_hold_a_record_per_step_and_per_epoch(make_trainer):
    trainer = make_trainer(max_steps=12)
    trainer.train()
    batches, epochs = records(trainer.run.folder, "batch"), records(trainer.run.folder, "epoch")
    assert [record["step"] for record in batches] == list(range(1, 13))
    assert [record["epoch"] for record in batches] == [0] * 5 + [1] * 5 + [2] * 2
    assert [(record["step"], record["epoch"]) for record in epochs] == [(5, 0), (10, 1), (12, 2)]
    for record in batches:
        assert {"loss", "double_loss", "lr", "grad_norm", "images_per_second"} <= set(record)
    for epoch, size in enumerate((5, 5, 2)):
        losses = [record["loss"] for record in batches if record["epoch"] == epoch]
        assert epochs[epoch]["train/loss"] == pytest.approx(sum(losses) / size)
    assert "train/lr" not in epochs[0], "a mean learning rate means nothing"


def test_each_step_tells_its_time_its_throughput_and_its_memory(make_trainer):
    task = LineTask()
    task.before = lambda step: time.sleep(0.05)
    trainer = make_trainer(task=task, max_steps=6)
    trainer.train()
    used = psutil.Process().memory_info().rss / 2**30
    for record in records(trainer.run.folder, "batch"):
        assert 0 < record["data_seconds"] < 0.05 <= record["compute_seconds"], "the sleep is part of the step"
        seconds = record["data_seconds"] + record["compute_seconds"]
        assert record["images_per_second"] == pytest.approx(2 / seconds)
        assert used / 2 < record["memory_gib"] <= 2 * used


def test_time_spent_waiting_for_data_is_counted_as_such(make_trainer):
    class Slow(LineTask):
        def collate(self, items):
            time.sleep(0.05)
            return super().collate(items)

    trainer = make_trainer(task=Slow(), max_steps=3)
    trainer.train()
    assert all(record["data_seconds"] >= 0.05 for record in records(trainer.run.folder, "batch"))


# Profiling and compilation


def test_profile_is_a_trace_of_a_few_steps(make_trainer):
    trainer = make_trainer(max_steps=12, profile=True)
    trainer.train()
    (path,) = (trainer.run.folder / "profile").iterdir()
    assert path.name == "steps-process0.json"
    events = json.loads(path.read_text())["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert len([name for name in names if name.startswith("ProfilerStep#")]) == PROFILED_STEPS
    assert any(name.startswith("aten::") for name in names)
    assert any(name.startswith("Optimizer.step") for name in names)
    assert "[memory]" in names


def test_profile_of_a_run_that_ends_early_is_written_all_the_same(make_trainer):
    make_trainer(max_steps=5, profile=True).train()
    trainer = make_trainer("unprofiled", max_steps=5)
    trainer.train()
    (path,) = trainer.run.folder.parent.rglob("profile/*.json")
    assert json.loads(path.read_text())["traceEvents"]
    assert not (trainer.run.folder / "profile").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile has some of its own
@pytest.mark.parametrize("stage", STAGES)
def test_compiled_stage_takes_the_same_steps_and_saves_the_same_model(tiny_run, tmp_path, stage):
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"torch.compile needs a C++ compiler, and there is no {compiler} here")
    module, _, recipe_class, train = STAGES[stage]
    shared = [] if stage == "vqvae" else ["model.dropout=0"]  # compiled dropout draws its own numbers
    plain, compiled = (
        [f"output_dir={tmp_path / str(on)}", f"loop.compile={on}", *shared] for on in (False, True)
    )
    torch._dynamo.utils.counters.clear()
    getattr(module, train)(load_recipe(recipe_class, tiny_run.configs[stage], plain))
    assert not torch._dynamo.utils.counters["frames"]
    getattr(module, train)(load_recipe(recipe_class, tiny_run.configs[stage], compiled))
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "premise: something was compiled"
    found, expected = (scalars(untimed(records(tmp_path / name))) for name in ("True", "False"))
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    found, expected = (
        load_file(tmp_path / name / "best" / "model.safetensors") for name in ("True", "False")
    )
    assert set(found) == set(expected), "no trace of the compilation in the names"
    model_class = {"vqvae": VQVAEModel, "prior": PixelCNNModel}[stage]
    loaded = model_class.from_pretrained(tmp_path / "True" / "best").state_dict()
    for name, value in found.items():
        assert torch.equal(loaded[name], value), name


# The run's folder


def test_folder_of_a_run_is_not_overwritten_without_resume(tiny_run):
    before = digests(tiny_run.vqvae)
    with pytest.raises(TrainingError, match="vqvae already holds a run: --resume it, or choose"):
        vqvae_stage.train_vqvae(load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], []))
    assert digests(tiny_run.vqvae) == before


def test_run_that_failed_before_its_first_step_may_start_anew(tiny_run, tmp_path):
    overrides = [f"output_dir={tmp_path / 'run'}", "loop.max_steps=3"]
    recipe = load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], [*overrides, "loop.batch_size=64"])
    with pytest.raises(TrainingError, match="fewer than one batch of 64"):
        vqvae_stage.train_vqvae(recipe)
    vqvae_stage.train_vqvae(load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], overrides))
