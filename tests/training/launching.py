"""Starting commands in several processes by torchrun, as users do, and waiting for their steps."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil

TIMEOUT = 600  # seconds after which a command hangs, even on a busy machine


def torchrun(*arguments, processes=2):
    """Start the rest of a command line in several processes."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        free_port(),
        *arguments,
    ]


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@contextmanager
def launched(command, log):
    """A command and its children, all gone at the end of the block."""
    with log.open("wb") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen([*map(str, command)], stdout=file, stderr=file, env=environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()


def run(command, log):
    """Run a command to its end; returns exit code and output."""
    with launched(command, log) as process:
        process.wait(TIMEOUT)
    return process.returncode, log.read_text()


def newest_step(folder):
    """Step of the last whole record; a run is writing them."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def wait_for_step(folder, step, is_alive):
    deadline = time.monotonic() + TIMEOUT
    while newest_step(folder) < step:
        assert is_alive(), f"ended at step {newest_step(folder)}, before step {step}"
        assert time.monotonic() < deadline
        time.sleep(0.002)
