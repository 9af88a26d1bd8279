"""The commands push and pull: what they print, and errors in one line."""

from pathlib import Path

import pytest
from fake_hub import Fault
from repository_folder import CARD, contents

REPO = "user/tiny"


def test_push_and_pull_there_and_back(online_hub, run, folder, tmp_path, monkeypatch):
    count = len(contents(folder))
    code, out, _ = run("push", folder, REPO, "--tag", "v1", "--message", "First version")
    commit = online_hub.commits(REPO)[0]
    assert code == 0
    assert f"pushed {count} files" in out
    assert f"0 deleted, 0 unchanged; checked at {online_hub.url}/{REPO}/commit/{commit}" in out
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, out, _ = run("pull", REPO, "--revision", "v1")
    assert code == 0
    assert out == "wrote tiny; next: isic-vq info tiny\n"
    assert contents(Path("tiny")) == contents(folder)


def test_push_again_says_that_there_is_nothing_to_do(online_hub, run, folder):
    run("push", folder, REPO)
    code, out, _ = run("push", folder, REPO)
    assert code == 0
    assert out.startswith(
        f"nothing to push: all {len(contents(folder))} files are there, {online_hub.url}/{REPO}/"
    )


def test_dry_run_lists_what_goes_and_what_stays(online_hub, run, folder):
    run("push", folder, REPO)
    (folder / "README.md").write_text(CARD + "more\n")
    (folder / "LICENSE-WEIGHTS").unlink()
    (folder / "train.parquet").write_bytes(b"\0" * 2500)
    code, out, _ = run("push", folder, REPO, "--dry-run")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["change", str(len(CARD) + 5), "bytes", "README.md"] in lines
    assert ["delete", "13", "bytes", "LICENSE-WEIGHTS"] in lines
    assert ["left", "out", "2.5", "kB", "train.parquet"] in lines
    assert out.splitlines()[-1].startswith(f"dry run: would push 1 files ({len(CARD) + 5} bytes), 1 deleted,")
    assert out.splitlines()[-1].endswith(f"to {REPO}")


def test_dry_run_of_a_new_repository_says_so(online_hub, run, folder):
    code, out, _ = run("push", folder, REPO, "--dry-run")
    assert code == 0
    assert out.splitlines()[-1].endswith(f"to {REPO}, which does not exist yet or is private")


def test_many_files_that_stay_are_counted(online_hub, run, folder):
    for index in range(25):
        (folder / f"{index:02d}.jpg").write_bytes(b"")
    _, out, _ = run("push", folder, REPO, "--dry-run")
    assert sum(line.startswith("left out") for line in out.splitlines()) == 21
    assert "left out 5 more files" in out


def test_a_pull_request_is_named(online_hub, run, folder):
    _, out, _ = run("push", folder, REPO, "--create-pr", "--private")
    assert f"checked at {online_hub.url}/{REPO}/discussions/1" in out
    assert online_hub.repos[REPO].private


@pytest.mark.parametrize("command", ["push", "pull"])
def test_errors_are_one_line_without_the_token(online_hub, run, folder, tmp_path, command):
    online_hub.faults.append(Fault(path="/api/", status=403, times=99))
    arguments = [folder, REPO] if command == "push" else [REPO, "-o", tmp_path / "out"]
    code, out, err = run(command, *arguments)
    assert code == 1
    assert out == ""
    assert err.startswith(f"error: your token may not do this with {REPO}")
    assert err.count("\n") == 1
    assert "hf_fake" not in err


def test_an_incomplete_folder_is_told_in_one_line(online_hub, run, folder):
    (folder / "model_index.json").unlink()
    code, _, err = run("push", folder, REPO)
    assert code == 1
    assert err == f"error: {folder} lacks model_index.json: expected a file, which isic-vq export writes\n"
