"""Commands that are killed at random moments, and the same command after that: as if it had never been killed."""

import hashlib
import json
import random
import signal
import subprocess
import sys
import time

import pytest
from repository_folder import contents

from isic_vq.models.upload import upload_folder

KILLS = 3
# What differs from run to run by nature: ids, times, speeds.
VOLATILE = {"run.json", "metrics.jsonl"}


def arguments(name, tiny_run):
    """A command in its own folder, whose output is named alike everywhere."""
    images = f"folder:{tiny_run.images['train']}"
    model = str(tiny_run.prior / "model")
    return {
        "train": ["train", tiny_run.configs["vqvae"], "output_dir=out", "loop.max_steps=12", "--resume"],
        "encode": ["encode", tiny_run.vqvae / "model", "--data", images, "-o", "out.parquet"],
        "prepare": ["data", "prepare", "out", "--data", images, "--size", "16"],
        "generate": [
            "generate", "-m", model, "-n", "96", "--shards", "parquet", "--shard-size", "16", "-o", "out"
        ],
        "export": ["export", model, "out", "--train-codes", tiny_run.codes["train"]],
        "compress": ["compress", tiny_run.images["train"], "out.ivq", "-m", model],
        "pull": ["pull", "user/tiny", "-o", "out"],
    }[name]  # fmt: skip


def content(path):
    """A file's bytes; of a report all but its environment, which names the commit of a clone that is worked on."""
    if path.name != "report.json":
        return path.read_bytes()
    report = json.loads(path.read_text())
    del report["environment"]
    return json.dumps(report).encode()


def listing(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(content(path)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in VOLATILE
    }


def seen(folder):
    """What has changed in a folder, roughly, while something works in it."""
    return sorted(path.as_posix() for path in folder.rglob("*"))


def run(command, folder, environment):
    done = subprocess.run(
        [sys.executable, "-m", "isic_vq", *map(str, command)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def wait_for_change(process, folder):
    before = seen(folder)
    while process.poll() is None and seen(folder) == before:
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "encode", "prepare", "generate", "export", "compress", "pull"])
def test_killed_at_random_and_run_again_it_ends_as_if_never_killed(
    name, online_hub, hub_env, saved, tiny_run, tmp_path
):
    if name == "pull":
        upload_folder(saved, contents(saved), "user/tiny", commit_message="First")
    command, moments = arguments(name, tiny_run), random.Random(name)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "isic_vq", *map(str, command)], cwd=whole, env=hub_env,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_change(process, whole)
    start = time.monotonic()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    span, hits = time.monotonic() - start, 0
    for _ in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-m", "isic_vq", *map(str, command)], cwd=killed, env=hub_env,
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for_change(process, killed)
        time.sleep(moments.uniform(0, span))
        hits += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(command, killed, hub_env)
    assert listing(killed) == listing(whole), f"{hits} of {KILLS} kills hit"
    assert {path.name for path in killed.rglob("*") if path.name in VOLATILE} == {
        path.name for path in whole.rglob("*") if path.name in VOLATILE
    }
    print(
        f"{name}: {hits} of {KILLS} kills hit within {span:.1f} s of work; the same {len(listing(whole))} files"
    )
