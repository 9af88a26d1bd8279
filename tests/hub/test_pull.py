"""A pull brings a repository whole, checked and unopened, or leaves everything as it was and says why."""

import errno
import json
import ntpath
import os
import shutil
from pathlib import Path

import pytest
from fake_hub import Fault
from huggingface_hub import HfApi, constants
from hypothesis import given
from hypothesis import strategies as st
from repository_folder import CARD, WEIGHTS, contents, write_repository

from isic_vq.hub.layout import is_safe
from isic_vq.hub.pretrained import ModelError
from isic_vq.hub.transfer import pull
from isic_vq.models.upload import HubError, upload_folder
from planted import plant

REPO = "user/tiny"
OTHERS_TOKEN = "hf_fake_other"


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A repository folder with little of the code, as every file costs requests: not to be changed."""
    folder = write_repository(tmp_path_factory.mktemp("saved") / "tiny")
    for path in folder.glob("*.py"):
        if path.name != "modes.py":
            path.unlink()
    return folder


@pytest.fixture
def pushed(online_hub, saved):
    """The hub, with the repository; its log starts after the push."""
    upload_folder(saved, contents(saved), REPO, commit_message="First", tag="v1")
    online_hub.log.clear()
    return online_hub


@pytest.fixture
def output(tmp_path):
    return tmp_path / "pulled"


def downloads(hub):
    """Paths of the files that were asked for."""
    return [
        entry.path.partition("/resolve/")[2].partition("/")[2]
        for entry in hub.log
        if "/resolve/" in entry.path
    ]


def refused(match, *arguments, error=HubError, **settings):
    """Run a pull that has to fail, and return its text: one line, no token in it."""
    with pytest.raises(error, match=match) as caught:
        pull(*arguments, **settings)
    text = str(caught.value)
    assert "hf_fake" not in text
    assert "\n" not in text
    return text


def test_what_is_pulled_is_what_was_pushed(pushed, saved, output):
    assert pull(REPO, output) == output
    assert contents(output) == contents(saved)
    assert not any(path.is_symlink() for path in output.rglob("*")), "the cache may be cleaned"


def test_the_cache_and_the_folder_do_not_share_files(pushed, output, tmp_path):
    pull(REPO, output)
    (output / "README.md").write_text("edited")
    pull(REPO, tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == CARD


def test_a_revision_is_pulled(pushed, saved, output):
    HfApi().upload_file(path_or_fileobj=f"{CARD}newer".encode(), path_in_repo="README.md", repo_id=REPO)
    pull(REPO, output, revision="v1")
    assert contents(output) == contents(saved)
    pull(REPO, output)
    assert (output / "README.md").read_text() == f"{CARD}newer"


def test_files_whose_names_look_like_patterns_are_pulled(pushed, output):
    names = {"notes[1].txt", "sub/a*.txt"}
    for path in names:
        HfApi().upload_file(path_or_fileobj=path.encode(), path_in_repo=path, repo_id=REPO)
    pull(REPO, output)
    assert names < contents(output).keys()


def test_nothing_that_is_pulled_is_run(pushed, output, tmp_path):
    code = f"open({str(tmp_path / 'was_run')!r}, 'w')\n".encode()
    for path in ("modes.py", "conftest.py", "sitecustomize.py", "vqvae/isic_vq.py"):
        HfApi().upload_file(path_or_fileobj=code, path_in_repo=path, repo_id=REPO)
    pull(REPO, output)
    assert (output / "modes.py").read_bytes() == code
    assert not (tmp_path / "was_run").exists()


HOSTILE = ["../evil.txt", "/abs", "a/../../b", "C:\\x", "a\\..\\b", "a//b", "./a", "sub/.git/config"]


@pytest.mark.parametrize("path", HOSTILE)
def test_a_listing_that_leads_out_is_refused_before_any_download(pushed, output, tmp_path, path):
    pushed.add_hostile_entry(REPO, path)
    text = refused(f"{REPO} lists the unsafe path", REPO, output)
    assert repr(path) in text
    assert downloads(pushed) == []
    assert list(tmp_path.rglob("*evil*")) == []
    assert not output.exists()


@given(st.text(alphabet="ab./\\:C\0\n-", max_size=8))
def test_a_safe_path_stays_inside_on_every_system(path):
    if is_safe(path):
        for module, root in ((os.path, "/top/folder"), (ntpath, r"\top\folder")):
            joined = module.normpath(module.join(root, path))
            assert module.dirname(joined) == root or joined.startswith(root + module.sep), path
        assert path.isprintable()


def test_a_damaged_download_is_told_and_not_kept(pushed, saved, output):
    pushed.faults.append(Fault(path=f"/resolve/.*/{WEIGHTS[1]}", corrupt=True, times=99))
    refused(f"{WEIGHTS[1]} of {REPO} arrived damaged.*pull again", REPO, output)
    assert not output.exists()
    pushed.faults.clear()
    pull(REPO, output)
    assert contents(output) == contents(saved)


@pytest.fixture
def small_steps(monkeypatch):
    """What arrives is written to the cache every hundred bytes instead of every ten million."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)


def cut(after_bytes, times):
    return Fault(path=f"/resolve/.*/{WEIGHTS[0]}", method="GET", after_bytes=after_bytes, times=times)


def ranges(hub):
    """The parts of the weights that were asked for; None for the whole."""
    found = [e for e in hub.log if e.path.endswith(WEIGHTS[0]) and e.method == "GET"]
    return [{k.lower(): v for k, v in entry.headers.items()}.get("range") for entry in found]


def test_a_connection_cut_in_a_download_is_overcome(pushed, saved, output, waits, small_steps):
    pushed.faults.append(cut(after_bytes=500, times=1))
    pull(REPO, output)
    assert len(waits) == 1
    assert ranges(pushed) == [None, "bytes=500-"]
    assert contents(output) == contents(saved)


def test_a_repeated_pull_asks_only_for_the_files_that_are_missing(pushed, saved, output, waits, small_steps):
    pushed.faults += [cut(after_bytes=500, times=1), cut(after_bytes=0, times=99)]
    text = refused(f"the connection.*broke while working on {REPO}.*run this again", REPO, output)
    assert "goes on" in text
    assert len(waits) == 5, "huggingface_hub tried again before"
    assert not output.exists()
    pushed.faults.clear()
    pushed.log.clear()
    pull(REPO, output)
    assert set(downloads(pushed)) == {WEIGHTS[0]}
    assert contents(output) == contents(saved)


def test_a_missing_repository_is_told(online_hub, output):
    refused("user/none does not exist, or your token may not see it", "user/none", output)
    refused("user/none does not exist or is private.*hf auth login", "user/none", output, token=False)


def test_a_private_repository_is_told(pushed, output):
    pushed.repos[REPO].private = True
    refused(f"{REPO} does not exist or is private.*hf auth login", REPO, output, token=False)
    refused(f"{REPO} does not exist, or your token may not see it", REPO, output, token=OTHERS_TOKEN)
    assert pull(REPO, output) == output, "its owner may"


@pytest.mark.parametrize("token", [False, OTHERS_TOKEN])
def test_a_gated_repository_is_told(pushed, output, token):
    pushed.repos[REPO].gated = True
    text = refused(f"{REPO} is gated: ask for access at", REPO, output, token=token)
    assert f"{pushed.url}/{REPO}" in text
    assert not output.exists()


def test_an_unknown_revision_is_told(pushed, output):
    refused(f"{REPO} has no revision v9: expected a branch, tag or commit", REPO, output, revision="v9")


def test_a_wrong_name_is_told(online_hub, output):
    refused("expected user/name", "user/a/b", output)


def test_a_rate_limit_says_when_to_come_back(pushed, output, waits):
    pushed.faults.append(Fault(path="/api/models/", status=429, headers={"Retry-After": "7"}, times=99))
    refused(f"{REPO} has to wait: run this again in 7 seconds", REPO, output)


def test_a_hub_in_trouble_is_told(pushed, output, waits):
    pushed.faults.append(Fault(path="/resolve/", status=503, times=999))
    refused(f"status 503.*{REPO}.*run this again later", REPO, output)
    assert not output.exists()


def test_a_503_in_the_middle_is_overcome(pushed, saved, output, waits):
    pushed.faults.append(Fault(path="/resolve/", method="HEAD", status=503, times=2))
    pull(REPO, output)
    assert contents(output) == contents(saved)


def test_a_server_that_is_not_there_is_told(pushed, output, waits):
    pushed.stop()
    refused(f"the connection to {pushed.url} broke while working on {REPO}", REPO, output)


def test_offline_mode_is_told(pushed, output, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(f"{REPO} is not reached because HF_HUB_OFFLINE is set", REPO, output)


def test_a_repository_that_is_no_model_of_ours_is_not_downloaded(online_hub, output):
    api = HfApi()
    api.create_repo(REPO)
    refused("holds no config.json", REPO, output)
    api.upload_file(path_or_fileobj=b'{"model_type": "bert"}', path_in_repo="config.json", repo_id=REPO)
    api.upload_file(path_or_fileobj=b"\0" * 100, path_in_repo="model.safetensors", repo_id=REPO)
    refused("is no model of isic-vq", REPO, output)
    assert "model.safetensors" not in downloads(online_hub)
    assert not output.exists()


def write_notes(output):
    (output / "notes.txt").write_text("mine")


def write_other_model(output):
    (output / "config.json").write_text(json.dumps({"model_type": "bert"}))


def write_own_model_and_notes(output):
    (output / "config.json").write_text(json.dumps({"model_type": "isic_vq"}))
    (output / "notes.txt").write_text("mine")


@pytest.mark.parametrize("fill", [write_notes, write_other_model, write_own_model_and_notes])
def test_a_folder_with_other_things_is_refused_and_left_alone(pushed, output, fill):
    output.mkdir()
    fill(output)
    before = contents(output)
    refused("choose another", REPO, output, error=ModelError)
    assert contents(output) == before
    assert downloads(pushed) == []


def test_a_file_in_the_place_of_the_folder_is_refused(pushed, output):
    output.write_text("mine")
    refused("choose another", REPO, output, error=ModelError)
    assert output.read_text() == "mine"


def test_an_earlier_pull_and_an_empty_folder_are_replaced(pushed, saved, output):
    output.mkdir()
    pull(REPO, output)
    shutil.copyfile(output / "README.md", output / "old.py")  # of the layout, so of an older version
    pull(REPO, output)
    assert contents(output) == contents(saved)


def test_a_full_disk_is_told_by_name_and_leaves_the_old_folder(pushed, saved, output, monkeypatch):
    def full_disk(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source, None, target)

    pull(REPO, output)
    monkeypatch.setattr(shutil, "copyfile", full_disk)
    refused(f"No space left on device.*{output}'$", REPO, output, error=OSError)
    assert contents(output) == contents(saved)
    assert [path.name for path in output.parent.iterdir() if "pulled" in path.name] == ["pulled"]


def test_a_full_disk_of_the_cache_is_told_by_name(pushed, output, monkeypatch):
    def full_disk(*arguments, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full_disk)
    refused(f"No space left on device.*{constants.HF_HUB_CACHE}'$", REPO, output, error=OSError)
    assert not output.exists()


def test_a_report_that_somebody_added_to_a_pull_is_not_removed(pushed, output):
    pull(REPO, output)
    (output / "reports").mkdir(exist_ok=True)
    (output / "reports" / "mine.json").write_text("{}")
    with pytest.raises(ModelError, match="would lose files such as reports/mine.json"):
        pull(REPO, output)
    assert (output / "reports" / "mine.json").is_file()


def test_a_pickle_in_place_of_any_file_is_copied_and_never_run(online_hub, saved, tmp_path):
    """The config alone is read, and a pickle is none."""
    for number, name in enumerate(set(contents(saved)) - {"README.md"}):  # which an upload reads
        folder, repo = shutil.copytree(saved, tmp_path / f"planted-{number}"), f"user/planted-{number}"
        plant(folder / name, tmp_path / "ran")
        upload_folder(folder, contents(folder), repo, commit_message="First")
        if name == "config.json":
            refused("is no model of isic-vq", repo, tmp_path / "out" / str(number))
        else:
            assert contents(pull(repo, tmp_path / "out" / str(number))) == contents(folder)
        assert not (tmp_path / "ran").exists(), name
