"""Training in several real processes: the same run as in one, and what becomes of it when one of them fails.

Over gloo: by torchrun, as users start it, or forked off a server that has the imports behind it.
"""

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed_worker import NO_DROPOUT, main, start, start_function
from launching import TIMEOUT, free_port, launched, newest_step, run, torchrun, wait_for_step
from run_folder import digests, records, untimed
from safetensors.torch import load_file

from isic_vq.evaluation.report import Report
from isic_vq.hub.pretrained import load_model
from isic_vq.models.modeling_isic_vq import IsicVQModel
from isic_vq.models.modeling_vqvae import VQVAEModel
from isic_vq.training.feed import EpochBatches
from isic_vq.training.load import load_recipe
from isic_vq.training.prior import train_prior
from isic_vq.training.processes import native_bf16
from isic_vq.training.recipe import PriorRecipe

ROOT = Path(__file__).resolve().parents[2]
SAVE_EVERY = 5


def assert_same_run(folder, reference):
    """Two runs left the same models and, times apart, the same numbers."""
    models = [digests(path / part) for part in ("model", "best") for path in (folder, reference)]
    assert models[0] == models[1]
    assert models[2] == models[3]
    assert untimed(records(folder)) == untimed(records(reference))


# Two processes are one


@pytest.mark.slow
def test_two_processes_and_parts_of_batches_train_as_one_process_on_whole_batches(tmp_path):
    """By benchmarks/parity.py: in float64 nothing but mistakes could part the runs."""
    script, output = ROOT / "benchmarks" / "parity.py", tmp_path / "parity.json"
    code, log = run([sys.executable, script, "--steps", 25, "--output", output], tmp_path / "log")
    assert code == 0, log
    runs = json.loads(output.read_text())["runs"]
    kinds = {(row["precision"], row["corrupt"], row["scales"], row["processes"]) for row in runs}
    compared = {("fp64", False), ("fp64", True), ("fp32", False)}
    assert {(*pair, scales, 2) for pair in compared for scales in (False, True)} <= kinds
    for row in runs:
        if not row["corrupt"]:
            assert row["resets"] > 0, "without resets nothing was tested of them"
            assert row["codebook_same_bits_in_all_processes"], row
            assert row["weights_same_bits_in_all_processes"], row
        if row["precision"] == "fp64":
            assert row["resets"] > 0
            assert row["flipped_assignments"] == 0 < row["assignments"], row
            assert row["logged_loss_difference"] <= 1e-6, "logged in float32"
            for name in ("codebook", "weights", "loss", "logged_perplexity"):
                assert row[f"{name}_difference"] <= 1e-8, (name, row)
        if row["corrupt"] and row["processes"] == 2:
            assert row["uneven_batches"] > 5, "premise: corrupt images made the parts differ in size"


def start_pair(folder, starter, *arguments):
    """Start two processes by what torchrun would set; returns both and their logs."""
    group = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    logs = [folder / f"log-{rank}" for rank in (0, 1)]
    return [
        starter(log, *arguments, RANK=rank, LOCAL_RANK=rank, **group) for rank, log in enumerate(logs)
    ], logs


def run_pair(folder, starter, *arguments):
    """Run two processes to their ends; returns what both printed."""
    pair, logs = start_pair(folder, starter, *arguments)
    for process in pair:
        process.join(TIMEOUT)
    output = "".join(log.read_text() for log in logs)
    assert [process.exitcode for process in pair] == [0, 0], output
    return output


# One process that fails, among two


@pytest.fixture(scope="module")
def scenarios(tiny_run, tmp_path_factory):
    """What both processes of `distributed_worker` saw, and the folder they worked in."""
    folder = tmp_path_factory.mktemp("scenarios")
    run_pair(folder, start_function, main, folder, tiny_run.configs["prior"])
    seen = [json.loads((folder / f"process-{rank}.json").read_text()) for rank in (0, 1)]
    return SimpleNamespace(folder=folder, seen=seen)


def test_nan_in_one_process_stops_all_with_the_same_words(scenarios):
    first, second = (seen["nan_in_one_process"]["error"] for seen in scenarios.seen)
    assert first == second
    assert first.startswith(
        "TrainingError: the loss is nan at step 4; the last good checkpoint is step-00000003."
    )


def test_full_disk_in_one_process_stops_all_and_keeps_the_older_checkpoint(scenarios):
    for seen in scenarios.seen:
        error = seen["full_disk_in_one_process"]["error"]
        assert error.startswith("CheckpointError: checkpoint of step 6 was not written ("), error
        assert "the last good one is step-00000003. Free some space" in error
    assert "(another process failed)" in scenarios.seen[0]["full_disk_in_one_process"]["error"]
    folder = scenarios.folder / "full_disk_in_one_process" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-00000003"], "nothing half-written stays"


def test_evaluation_runs_no_collective(scenarios):
    assert all(seen["evaluation_in_one_process"]["measured"] for seen in scenarios.seen)


def test_batch_that_is_corrupt_for_one_process_alone_is_an_error_in_all(scenarios):
    for seen in scenarios.seen:
        assert seen["no_image_for_kmeans_in_one_process"]["error"].startswith(
            "every image of a batch is corrupt"
        )


def test_prior_of_two_processes_is_that_of_one(scenarios, tiny_run, tmp_path):
    overrides = [f"output_dir={tmp_path / 'prior'}", *NO_DROPOUT]
    train_prior(load_recipe(PriorRecipe, tiny_run.configs["prior"], overrides))
    one, two = (folder / "prior" for folder in (tmp_path, scenarios.folder))
    expected, found = (
        load_file(f / "checkpoints" / "step-00000012" / "model.safetensors") for f in (one, two)
    )
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    losses = [[record["loss"] for record in records(folder, "batch")] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


# Commands in two processes


def test_tokenizer_is_trained_by_two_processes(tiny_run, tmp_path):
    run_dir = tmp_path / "run"
    output = run_pair(tmp_path, start, "train", tiny_run.configs["vqvae"], f"output_dir={run_dir}")
    assert output.count(f"wrote {run_dir}/model") == 1, output
    assert [record["step"] for record in records(run_dir, "batch")] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in records(run_dir, "epoch")] == [0, 1]
    assert load_model(VQVAEModel, str(run_dir / "model")).config.num_codes == 8


def test_decoder_is_trained_by_two_processes(parts, decoder_settings, tmp_path):
    run_dir = tmp_path / "run"
    output = run_pair(tmp_path, start, "train", "stage=decoder", f"output_dir={run_dir}", *decoder_settings)
    assert output.count(f"wrote {run_dir}/model") == 1, output
    assert {path.parent.name for path in run_dir.rglob("preprocessor_config.json")} == {"best", "model"}
    assert list(run_dir.rglob("report.json")) == [run_dir / "report.json"]
    assert not list(run_dir.glob(".*")), "nothing half-written stays"
    assert [record["step"] for record in records(run_dir, "batch")] == [1, 2, 3, 4, 5, 6]
    report = Report.load(run_dir / "report.json")
    assert {metric.n for metric in report.metrics} == {16}, "every image, by one process"
    folders = (parts / "tokenizer", run_dir / "model")
    before, after = (load_model(VQVAEModel, str(folder)).state_dict() for folder in folders)
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"decoder"}, "encoder and codebook are as they were"


PRIOR_STEPS = 200


@pytest.mark.slow
def test_terminated_torchrun_saves_and_resumes_to_the_same_bytes(tiny_run, tmp_path):
    """A prior with dropout."""

    def command(run_dir, *more):
        loop = [f"loop.max_steps={PRIOR_STEPS}", "loop.eval_every=10", "loop.save_every=50"]
        config = tiny_run.configs["prior"]
        return ["-m", "isic_vq", "train", config, f"output_dir={run_dir}", *loop, *more]

    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    code, output = run(torchrun(*command(whole)), tmp_path / "whole-log")
    assert code == 0, output
    assert output.count(f"wrote {whole}/model") == 1, output
    assert [record["step"] for record in records(whole, "batch")] == list(range(1, PRIOR_STEPS + 1))
    assert load_model(IsicVQModel, str(whole / "model")).prior.config.num_codes == 8

    with launched(torchrun(*command(run_dir)), tmp_path / "log") as process:
        wait_for_step(run_dir, 10, lambda: process.poll() is None)
        process.send_signal(signal.SIGTERM)
        process.wait(TIMEOUT)
    assert process.returncode
    assert (
        "a checkpoint was saved. Continue with the same command and --resume"
        in (tmp_path / "log").read_text()
    )
    newest = sorted((run_dir / "checkpoints").iterdir())[-1]
    assert newest.name < f"step-{PRIOR_STEPS:08d}"
    assert {"random-0.json", "random-1.json"} <= {path.name for path in newest.iterdir()}

    alone = start(tmp_path / "alone", *command(run_dir)[2:], "--resume")
    alone.join(TIMEOUT)
    assert alone.exitcode == 1
    refusal = f"error: {newest.name} was written by 2 processes: resume with as many, not 1"
    assert refusal in (tmp_path / "alone").read_text()

    code, output = run(torchrun(*command(run_dir, "--resume")), tmp_path / "resumed")
    assert code == 0, output
    assert_same_run(run_dir, whole)  # dropout went on in both processes as without a stop


# A process that is gone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)], ids=str
)
def test_the_other_process_gives_up_and_says_why(tiny_run, tmp_path, victim, number):
    run_dir, seconds = tmp_path / "run", 20
    arguments = ["train", tiny_run.configs["vqvae"], f"output_dir={run_dir}"]
    arguments += ["loop.max_steps=1000000", "loop.eval_every=1000000", "loop.save_every=1000000"]
    arguments += [f"loop.process_timeout={seconds}"]
    pair, logs = start_pair(tmp_path, start, *arguments)
    try:
        wait_for_step(run_dir, 3, lambda: all(process.is_alive() for process in pair))
        os.kill(pair[victim].pid, number)
        survivor, log = pair[1 - victim], logs[1 - victim]
        survivor.join(3 * seconds)
        assert survivor.exitcode == 1, log.read_text()
    finally:
        for process in pair:
            process.kill()
            process.join()
    (line,) = (line for line in log.read_text().splitlines() if line.startswith("error: "))
    assert f"process {1 - victim} of 2 lost another one (" in line
    assert "run the same command with --resume" in line


def test_sharded_launches_are_refused(tiny_run, tmp_path):
    arguments = ["train", tiny_run.configs["vqvae"], f"output_dir={tmp_path / 'run'}"]
    process = start(tmp_path / "log", *arguments, fsdp=True, ACCELERATE_USE_FSDP="true")
    process.join(TIMEOUT)
    output = (tmp_path / "log").read_text()
    assert process.exitcode == 1, output
    assert "error: training was launched with FSDP: expected plain data parallelism (DDP)" in output
    assert not (tmp_path / "run").exists()


# Killed at any moment


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [("vqvae", "fp32"), ("vqvae", "bf16"), ("prior", "fp32")])
def test_killed_five_times_and_resumed_is_the_uninterrupted_run(tiny_run, tmp_path, stage, precision):
    if precision == "bf16" and not native_bf16(torch.device("cpu")):
        pytest.skip("this CPU does not multiply bfloat16")
    loop = ["loop.max_steps=150", "loop.eval_every=8", f"loop.save_every={SAVE_EVERY}"]
    command = ["train", tiny_run.configs[stage], *loop, f"loop.precision={precision}"]
    reference = start(tmp_path / "reference-log", *command, f"output_dir={tmp_path / 'reference'}")
    reference.join(TIMEOUT)
    assert reference.exitcode == 0, (tmp_path / "reference-log").read_text()

    run_dir, moments, lost = tmp_path / "run", random.Random(f"{stage} {precision}"), []
    for turn in range(6):
        log, killed_at = tmp_path / f"log-{turn}", newest_step(run_dir)
        process = start(log, *command, f"output_dir={run_dir}", *(["--resume"] if turn else []))
        if turn < 5:
            step = max(killed_at + moments.randint(1, 2 * SAVE_EVERY), SAVE_EVERY + 1)
            wait_for_step(run_dir, step, process.is_alive)
            time.sleep(0.02 * moments.random())
            assert process.is_alive(), "it ended before it could be killed"
            process.kill()
        process.join(TIMEOUT)
        if turn:
            lost.append(killed_at - int(re.search(r"resumed at step (\d+)", log.read_text())[1]))
    assert process.exitcode == 0, log.read_text()
    assert len(lost) == 5
    assert all(0 <= steps <= SAVE_EVERY for steps in lost), lost
    assert_same_run(run_dir, tmp_path / "reference")
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_processes_cut_a_batch_without_gap_or_overlap():
    whole = list(EpochBatches(21, 8, seed=0))
    parts = [list(EpochBatches(21, 8, 0, micro_batches=2, world=2, rank=rank)) for rank in (0, 1)]
    for batch in range(2):
        pieces = [part[2 * batch + micro] for micro in (0, 1) for part in parts]
        assert sum(pieces, []) == whole[batch]
