"""Who works in a folder, and whether with the same settings: a lock ends with its process, however that ends."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from isic_vq import locks as locking
from isic_vq.demo import server
from isic_vq.files import beside, remove_leftovers
from isic_vq.locks import InUseError, hold
from isic_vq.models.repository import staging_folder
from isic_vq.work import differences, differences_text

HOLDER = """
import os, sys, time
from pathlib import Path
from isic_vq.locks import hold
with hold(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):
    if sys.argv[4] == "fork" and os.fork() == 0:
        print("held", flush=True)
        os.execvp("sleep", ["sleep", "60"]) if sys.argv[5] == "exec" else time.sleep(60)
    if sys.argv[4] != "fork":
        print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder():
    """Start processes that hold a target, and end them with the test."""
    started = []

    def start(target, rank=0, world=1, launch="", how=("alone", "")):
        environment = {**os.environ, "MASTER_PORT": launch, "WORLD_SIZE": str(world)}
        command = [sys.executable, "-c", HOLDER, str(target), str(rank), str(world), *how]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def launched(monkeypatch):
    """Make this process one of a launch."""

    def be(launch, world):
        monkeypatch.setenv("MASTER_PORT", launch)
        monkeypatch.setenv("WORLD_SIZE", str(world))

    return be


def locks(folder):
    return sorted(path.name for path in folder.iterdir() if ".lock" in path.name)


def test_the_second_process_says_who_has_it_and_a_killed_one_has_it_no_more(holder, tmp_path):
    first = holder(tmp_path / "run")
    with pytest.raises(InUseError) as error, hold(tmp_path / "run"):
        pytest.fail("held twice")
    assert (
        f"run is in use by process {first.pid} of host {locking.HOST}: wait for it, end it, or choose"
        in str(error.value)
    )
    with hold(tmp_path / "other"):
        assert locks(tmp_path) == [".other.lock", ".run.lock"]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert locks(tmp_path) == [".run.lock"], "premise: a killed process leaves the file"
    with hold(tmp_path / "run"):
        assert (tmp_path / ".run.lock").read_text().startswith(f"{os.getpid()} {locking.HOST} ")
    assert locks(tmp_path) == []


def test_a_process_may_hold_what_it_holds_until_the_last_block_ends(holder, tmp_path):
    target = tmp_path / "run"
    with hold(target):
        with hold(tmp_path / "." / "run"):
            pass
        script = "import sys; from pathlib import Path; from isic_vq.locks import hold\nwith hold(Path(sys.argv[1])): pass"
        done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True)
        assert f"in use by process {os.getpid()}" in done.stderr
    assert locks(tmp_path) == []
    holder(target)


@pytest.mark.parametrize("how", [("fork", ""), ("fork", "exec")])
def test_a_child_keeps_no_lock_of_a_killed_parent(holder, tmp_path, how):
    parent = holder(tmp_path / "run", how=how)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    with hold(tmp_path / "run"):
        pass


def test_processes_of_one_launch_share_and_another_launch_does_not(holder, launched, tmp_path):
    target = tmp_path / "shards"
    first = holder(target, 0, 3, "1")
    launched("1", 3)
    with hold(target, 1, 3):
        assert locks(tmp_path) == [".shards.lock.0", ".shards.lock.1"]
    for launch, rank, world in (("1", 0, 3), ("2", 1, 3), ("1", 1, 2), ("", 0, 1)):
        launched(launch, world)
        with pytest.raises(InUseError, match=f"in use by process {first.pid}"), hold(target, rank, world):
            pytest.fail("held twice")
        assert locks(tmp_path) == [".shards.lock.0"]
    first.kill()
    first.wait()
    with hold(target):
        assert locks(tmp_path) == [".shards.lock"], "what the killed one left is gone"
    holder(target)
    launched("1", 3)
    with pytest.raises(InUseError), hold(target, 1, 3):
        pytest.fail("shared with a process that is alone")


def test_without_locks_of_the_file_system_the_text_decides(tmp_path, monkeypatch, caplog):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locking.fcntl, "flock", no_locks)
    gone = subprocess.Popen(["true"])
    gone.wait()
    lock = tmp_path / ".run.lock"
    for text, said in (
        (f"{os.getppid()} {locking.HOST} ", f"process {os.getppid()} of host {locking.HOST}: wait for it"),
        (f"{gone.pid} elsewhere ", f"process {gone.pid} of host elsewhere: if it is gone, delete .run.lock"),
    ):
        lock.write_text(text)
        with pytest.raises(InUseError, match=said), hold(tmp_path / "run"):
            pytest.fail("held twice")
        assert lock.read_text() == text
    assert not caplog.text
    lock.write_text(f"{gone.pid} {locking.HOST} ")
    with hold(tmp_path / "run"):
        assert lock.read_text().startswith(f"{os.getpid()} ")
    assert f"took over from process {gone.pid} of this host, which is gone" in caplog.text
    assert locks(tmp_path) == []


def test_where_nobody_may_write_beside_a_folder_its_lock_lies_in_it(tmp_path, monkeypatch):
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with hold(tmp_path / "mounted"):
        assert (locks(tmp_path), locks(tmp_path / "mounted")) == ([], [".mounted.lock"])
    assert locks(tmp_path / "mounted") == []


def test_an_error_of_the_block_lets_go(tmp_path):
    with pytest.raises(KeyError), hold(tmp_path / "run"):
        raise KeyError
    assert locks(tmp_path) == []


def test_leftovers_of_processes_that_are_gone_go_and_others_stay(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    here, there = f"{gone.pid}-{locking.HOST}", f"{gone.pid}-elsewhere"
    for name in (f".a.png.{here}.tmp", f".b.png.{gone.pid}.tmp", f".c.{there}.tmp", ".notes.tmp", "d.tmp"):
        (tmp_path / name).write_text("half")
    living = beside(tmp_path / "e.png", "tmp")
    living.write_text("half")
    for name in (f".model.{here}.tmp", f".model.{here}.old", f".kept.{here}.old", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    remove_leftovers(tmp_path)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {f".c.{there}.tmp", ".notes.tmp", "d.tmp", living.name, "model", "kept"}
    assert (tmp_path / "model" / "weights").read_text() == f".model.{here}.old", "killed between two renames"
    assert (tmp_path / "kept" / "weights").read_text() == "kept"


def test_a_model_that_is_saved_tidies_up_after_a_killed_process(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    host = socket.gethostname()
    left, living, foreign = (
        tmp_path / name
        for name in (
            f".saving-{host}-{gone.pid}-x",
            f".saving-{host}-{os.getppid()}-x",
            f".saving-other-{gone.pid}-x",
        )
    )
    for folder in (left, living, foreign):
        folder.mkdir()
    with staging_folder(tmp_path) as staged:
        assert staged.parent == tmp_path
        assert sorted(tmp_path.iterdir()) == sorted([living, foreign, staged])
    assert not staged.exists()


def test_the_demo_removes_uploads_of_killed_servers(tmp_path, monkeypatch):
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(server, "gettempdir", lambda: str(tmp_path))
    for pid in (gone.pid, os.getppid()):
        (tmp_path / f"{server.UPLOADS}{pid}-x" / "upload").mkdir(parents=True)
    server.remove_old_uploads()
    assert [path.name for path in tmp_path.iterdir()] == [f"{server.UPLOADS}{os.getppid()}-x"]


def test_differences_are_named_by_key():
    begun = {
        "loop": {"seed": 0, "rate": 1, "same": [1, 2]},
        "gone": True,
        "sources": [{"name": "a"}, {"name": "b"}],
    }
    now = {
        "loop": {"seed": 1, "rate": 1.0, "same": (1, 2)},
        "new": "x",
        "sources": [{"name": "a"}, {"name": "c"}],
    }
    found = differences(begun, now)
    assert found == {
        "loop.seed": (0, 1),
        "gone": (True, None),
        "new": (None, "x"),
        "sources.1.name": ("b", "c"),
    }
    assert differences_text(found).startswith("loop.seed = 0, and this is 1; gone = True, and this is None")
    assert differences(begun, json.loads(json.dumps(begun))) == {}
    assert differences({"a.b": 1}, {"a": {"b": 1}}) == {}, "flat already"


def test_commands_say_who_is_at_their_output(run, tiny_run, tmp_path):
    images, model = f"folder:{tiny_run.images['train']}", tiny_run.prior / "model"
    commands = {
        "run": ["train", tiny_run.configs["vqvae"], f"output_dir={tmp_path / 'run'}"],
        "codes.parquet": [
            "encode",
            tiny_run.vqvae / "model",
            "--data",
            images,
            "-o",
            tmp_path / "codes.parquet",
        ],
        "prepared": ["data", "prepare", tmp_path / "prepared", "--data", images, "--size", 16],
        "shards": ["generate", "-m", model, "-n", 2, "--shards", "parquet", "-o", tmp_path / "shards"],
        "exported": ["export", model, tmp_path / "exported", "--train-codes", tiny_run.codes["train"]],
        "images.ivq": ["compress", tiny_run.images["train"], tmp_path / "images.ivq", "-m", model],
    }
    for name, command in commands.items():
        with (tmp_path / f".{name}.lock").open("w") as lock:
            locking.fcntl.flock(lock, locking.fcntl.LOCK_EX)
            lock.write(f"4321 {locking.HOST} ")
            lock.flush()
            code, _, stderr = run(*command)
        assert code == 1, name
        assert (
            f"error: {name} is in use by process 4321 of host {locking.HOST}: wait for it, end it, or"
            in stderr
        )
        assert not (tmp_path / name).exists(), name
