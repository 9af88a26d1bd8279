"""A push makes a repository exactly the folder, in one checked commit, or says in one sentence why not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback

import numpy as np
import pytest
from fake_hub import Fault
from huggingface_hub import HfApi
from repository_folder import CARD, WEIGHTS, contents, oids, write_picture
from safetensors.numpy import load_file, save_file

from isic_vq.hub.layout import in_layout, is_safe
from isic_vq.hub.pretrained import ModelError, default_checkpoint
from isic_vq.hub.transfer import push
from isic_vq.models.upload import HubError, PlannedFile, upload_folder

REPO = "user/tiny"
OTHERS_TOKEN = "hf_fake_other"
SECRET = "hf_" + "abcdefghij" * 3


def requests(hub, *methods):
    """Paths of the logged requests, or of those with one of the methods."""
    return [entry.path for entry in hub.log if not methods or entry.method in methods]


def uploads(hub):
    """The large files that were sent whole, by their hash."""
    return [e.path.rpartition("/")[2] for e in hub.log if e.method == "PUT" and e.status == 200]


def assert_is_the_folder(hub, folder, revision="main"):
    """The repository's files, hash by hash, are the folder's and the Hub's own one."""
    found, expected = hub.files(REPO, revision), oids(contents(folder))
    assert found.keys() - {".gitattributes"} == expected.keys()
    assert [path for path in expected if found[path] not in expected[path]] == []


def change_weights(path):
    save_file({name: np.asarray(tensor + 1) for name, tensor in load_file(path).items()}, path)


def refused(match, *arguments, error=HubError, **settings):
    """Run a push that has to fail, and return its text: one line, no token in it."""
    with pytest.raises(error, match=match) as caught:
        push(*arguments, **settings)
    text, shown = str(caught.value), "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown, "not in a traceback either"
    assert "hf_fake" not in text
    assert "\n" not in text
    return text


def test_the_repository_becomes_the_folder_in_one_commit(online_hub, folder):
    done = push(folder, REPO)
    assert_is_the_folder(online_hub, folder)
    assert len(online_hub.commits(REPO)) == 2, "the Hub's first commit, and ours"
    assert done.result.commit == online_hub.commits(REPO)[0]
    assert {file.action for file in done.plan} == {"add"}
    assert done.left_out == [], "all that save_pretrained writes is of the layout"


def test_a_second_push_of_the_same_folder_makes_no_commit(online_hub, folder):
    push(folder, REPO)
    online_hub.log.clear()
    done = push(folder, REPO)
    assert not done.result.changed
    assert len(online_hub.commits(REPO)) == 2
    assert done.result.commit == online_hub.commits(REPO)[0]
    assert [path for path in requests(online_hub) if "/commit/" in path or "preupload" in path] == []


def test_old_files_leave_in_the_same_commit(online_hub, folder):
    """A root model.safetensors would be read instead of the parts."""
    api = HfApi()
    api.create_repo(REPO)
    for path in ("model.safetensors", "old/notes.txt", "README.md"):
        api.upload_file(path_or_fileobj=f"{CARD}old".encode(), path_in_repo=path, repo_id=REPO)
    before = len(online_hub.commits(REPO))
    done = push(folder, REPO)
    assert_is_the_folder(online_hub, folder)
    assert len(online_hub.commits(REPO)) == before + 1
    assert {f.path for f in done.plan if f.action == "delete"} == {"model.safetensors", "old/notes.txt"}
    assert {f.path for f in done.plan if f.action == "change"} == {"README.md"}
    assert ".gitattributes" in online_hub.files(REPO), "it tells the Hub what is a large file"


def test_only_the_changed_file_is_sent(online_hub, folder):
    push(folder, REPO)
    change_weights(folder / WEIGHTS[0])
    online_hub.log.clear()
    done = push(folder, REPO)
    assert [file.path for file in done.plan if file.action != "same"] == [WEIGHTS[0]]
    assert len(uploads(online_hub)) == 1
    assert_is_the_folder(online_hub, folder)


def test_dry_run_tells_the_plan_and_writes_nothing(online_hub, folder):
    push(folder, REPO)
    (folder / "README.md").write_text(CARD + "more\n")
    (folder / "provenance.json").unlink()
    (folder / ".env").write_text("secret")
    online_hub.log.clear()
    done = push(folder, REPO, dry_run=True, token=False)
    assert done.result is None
    assert done.exists
    assert [file for file in done.plan if file.action != "same"] == [
        PlannedFile("change", "README.md", len(CARD) + 5),
        PlannedFile("delete", "provenance.json", 3),
    ]
    assert done.left_out == [(".env", 6)]
    assert set(requests(online_hub, "POST", "PUT", "DELETE", "PATCH")) == set()
    assert requests(online_hub, "GET") != []
    assert len(online_hub.commits(REPO)) == 2


def test_dry_run_says_that_there_is_no_repository_yet(online_hub, folder):
    done = push(folder, REPO, dry_run=True)
    assert not done.exists
    assert {file.action for file in done.plan} == {"add"}
    assert {file.path for file in done.plan} == set(contents(folder))
    assert requests(online_hub, "POST", "PUT") == []


@pytest.mark.parametrize(
    "path",
    ["config.json", "LICENSE", "LICENSE-WEIGHTS", "modeling_isic_vq.py", "vqvae/model.safetensors"]
    + [
        "prior/isic_vq.py",
        "previews/nevus.png",
        "figures/loss.png",
        "reports/test.json",
        "onnx/encoder.onnx",
    ],
)
def test_the_layout_holds(path):
    assert in_layout(path)


@pytest.mark.parametrize(
    "path",
    ["model.safetensors", ".env", ".hidden.py", ".git/config.json", "images/a.png", "a.png", "previews/a.jpg"]
    + ["codes.parquet", "optimizer.pt", "vqvae/optimizer.bin", "vqvae/.x.py", "reports/a/b.json", "a/b.py"]
    + ["previews/sub/a.png", "checkpoints/prior/model.safetensors", "config.json.bak", "metadata.csv"],
)
def test_the_layout_leaves_out(path):
    assert not in_layout(path)


def test_what_is_not_of_the_layout_stays_here(online_hub, folder, tmp_path):
    (tmp_path / "patient.png").write_bytes(b"elsewhere")
    for path in (".env", "train.parquet", "vqvae/optimizer.pt", "images/a.jpg", ".cache/x/config.json"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("private")
    (folder / "previews" / "link.png").symlink_to(tmp_path / "patient.png")
    (folder / "reports").symlink_to(tmp_path)
    expected = {".env", "train.parquet", "vqvae/optimizer.pt", "images/a.jpg", ".cache/x/config.json"}
    done = push(folder, REPO)
    assert {path for path, _ in done.left_out} == expected | {"previews/link.png", "reports"}
    assert not (online_hub.files(REPO).keys() & {path for path, _ in done.left_out})
    assert b"private" not in b"".join(entry.body for entry in online_hub.log)


def test_code_may_be_linked_as_in_a_clone(online_hub, folder):
    shutil.move(folder / "modes.py", folder.parent / "modes.py")
    (folder / "modes.py").symlink_to(folder.parent / "modes.py")
    push(folder, REPO)
    assert_is_the_folder(online_hub, folder)


def test_a_link_that_only_looks_like_code_is_left_out(online_hub, folder):
    (folder.parent / "secrets.txt").write_text("private")
    (folder / "extra.py").symlink_to(folder.parent / "secrets.txt")
    assert push(folder, REPO).left_out[0][0] == "extra.py"
    assert "extra.py" not in online_hub.files(REPO)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-4])


def edit_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def index_with(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def link_to_elsewhere(folder):
    target = shutil.move(folder / "config.json", folder.parent / "config.json")
    (folder / "config.json").symlink_to(target)


BROKEN = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "lacks config.json.*isic-vq export"),
    "linked config": (link_to_elsewhere, "lacks config.json.*symbolic link.*cp -rL"),
    "no card": (lambda f: (f / "README.md").unlink(), "lacks README.md.*isic-vq card"),
    "other model": (lambda f: edit_json(f / "config.json", model_type="bert"), "'bert' model: expected 'isic_vq'"),
    "config of another kind": (lambda f: (f / "config.json").write_text("[1]"), "config.json is not a JSON object"),
    "no model_index": (lambda f: (f / "model_index.json").unlink(), "lacks model_index.json.*isic-vq export"),
    "config without code": (lambda f: edit_json(f / "config.json", auto_map={}), "config.json names no code"),
    "missing code": (lambda f: (f / "modeling_isic_vq.py").unlink(), "lacks modeling_isic_vq.py, which its .* names"),
    "missing imported code": (lambda f: (f / "modes.py").unlink(), "lacks modes.py, which its .*py names"),
    "missing code of a part": (lambda f: (f / "prior/isic_vq.py").unlink(), "lacks prior/isic_vq.py, which its model_index"),
    "missing diffusers code": (lambda f: (f / "pipeline.py").unlink(), "lacks pipeline.py, which its"),
    "broken json": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is not JSON"),
    "card without metadata": (lambda f: (f / "README.md").write_text("# a"), "README.md has no metadata"),
    "card with bad metadata": (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "README.md has unreadable metadata"),
    "truncated weights": (lambda f: shorten(f / WEIGHTS[0]), "vqvae/model.safetensors is damaged"),
    "weights of one byte": (lambda f: (f / WEIGHTS[1]).write_bytes(b"x"), "prior/model.safetensors is damaged"),
    "missing weights": (lambda f: (f / WEIGHTS[1]).unlink(), "lacks prior/model.safetensors, which its index"),
    "empty index": (lambda f: index_with(f, dict.clear), "has no weight_map"),
    "index leads out": (
        lambda f: index_with(f, lambda m: m.update({"vqvae.x": "../vqvae/model.safetensors"})),
        "names '../vqvae/model.safetensors': expected a path inside",
    ),
    "foreign tensor": (
        lambda f: save_file({**load_file(f / WEIGHTS[0]), "vqvae.extra": load_file(f / WEIGHTS[0]).popitem()[1]}, f / WEIGHTS[0]),
        "disagree about 1 tensors, such as vqvae.extra",
    ),
    "missing tensor": (
        lambda f: index_with(f, lambda m: m.update({"prior.missing": WEIGHTS[1]})),
        "disagree about 1 tensors, such as prior.missing",
    ),
    "unmarked picture": (lambda f: write_picture(f / "previews" / "nevus.png", None), "previews/nevus.png may be a data image"),
    "another program's picture": (lambda f: write_picture(f / "figures" / "a.png", "GIMP"), "figures/a.png may be a data image"),
    "a data image beside its reconstruction": (
        lambda f: write_picture(f / "previews" / "grid.png", "isic-vq 0.1.0", "originals above reconstructions"),
        "previews/grid.png may show a data image",
    ),
    "no picture": (lambda f: (f / "previews" / "b.png").write_bytes(b"JPEG"), "b.png is not a readable PNG"),
    "token": (lambda f: (f / "provenance.json").write_text(json.dumps({"a": SECRET})), "provenance.json holds a Hub token"),
    "token in code": (lambda f: (f / "modes.py").write_text(f"T = '{SECRET}'"), "modes.py holds a Hub token"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_must_not_go_is_refused_before_any_request(online_hub, folder, name):
    edit, message = BROKEN[name]
    edit(folder)
    refused(message, folder, REPO, error=ModelError)
    assert requests(online_hub) == []


def test_paths_that_lead_out_are_unsafe():
    unsafe = [
        "../a",
        "a/../b",
        "/a",
        "a//b",
        "./a",
        "a/.",
        "",
        "a\\b",
        "C:/a",
        "a\0b",
        "a\nb",
        ".git/config",
        "a/",
    ]
    assert [path for path in unsafe if is_safe(path)] == []
    assert all(is_safe(path) for path in ("a", "a/b.c", "..a/b..", ".gitattributes", "ü/中 .json"))


def test_without_a_token_the_way_to_log_in_is_told(online_hub, folder):
    text = refused("hf auth login", folder, REPO, token=False)
    assert REPO in text
    assert "HF_TOKEN" in text


def test_a_token_that_the_hub_does_not_know_is_told(online_hub, folder):
    refused(f"refuses your token for {REPO}", folder, REPO, token=SECRET)


def test_a_token_that_cannot_be_a_header_is_not_shown(online_hub, folder):
    refused("cannot be sent", folder, REPO, token=f"{SECRET}\n{SECRET}")


def test_no_write_permission_is_told(online_hub, folder):
    push(folder, REPO)
    (folder / "LICENSE-WEIGHTS").write_text("other\n")
    refused(f"may not do this with {REPO}.*settings/tokens", folder, REPO, token=OTHERS_TOKEN)
    assert len(online_hub.commits(REPO)) == 2


def test_a_private_repository_of_others_looks_missing(online_hub, folder):
    online_hub.create(REPO, private=True)
    refused(f"{REPO}", folder, REPO, token=OTHERS_TOKEN)
    assert len(online_hub.commits(REPO)) == 1


@pytest.mark.parametrize("name", ["user/a/b", "user/..", "a b", "user/", "-a/b", "tiny"])
def test_a_wrong_name_is_told(online_hub, folder, name):
    refused("expected user/name", folder, name)
    assert requests(online_hub) == []


def test_a_model_can_be_pushed_under_its_name_alone(online_hub, folder):
    """As `push_to_hub` of every other model."""
    done = upload_folder(folder, contents(folder), "tiny", commit_message="First")
    assert_is_the_folder(online_hub, folder)
    assert f"/{REPO}/commit/" in done.url


def test_visibility_is_set_and_never_assumed(online_hub, folder):
    push(folder, REPO, private=True)
    assert online_hub.repos[REPO].private
    refused("is private, not public.*settings", folder, REPO, private=False)
    online_hub.repos[REPO].private = False
    (folder / "LICENSE-WEIGHTS").write_text("secret\n")
    refused("is public, not private.*nothing was sent", folder, REPO, private=True)
    assert len(online_hub.commits(REPO)) == 2


def test_a_rate_limit_says_when_to_come_back(online_hub, folder, waits):
    online_hub.faults.append(Fault(path="/preupload/", status=429, headers={"Retry-After": "7"}, times=99))
    refused(f"{REPO} has to wait: run this again in 7 seconds", folder, REPO)
    assert waits == [8.0] * 5, "huggingface_hub waited as long as it was told to, and a second"


def test_a_hub_in_trouble_is_told(online_hub, folder, waits):
    online_hub.faults.append(Fault(path="/preupload/", status=503, times=99))
    refused(f"status 503.*{REPO}.*run this again later", folder, REPO)
    assert len(waits) == 5, "and tried again before"


def test_offline_mode_is_told(online_hub, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(f"{REPO} is not reached because HF_HUB_OFFLINE is set", folder, REPO)


def test_a_503_in_the_middle_of_an_upload_is_overcome(online_hub, folder, waits):
    online_hub.faults.append(Fault(path="/_lfs/", method="PUT", status=503, times=2))
    push(folder, REPO)
    assert len(waits) == 2
    assert_is_the_folder(online_hub, folder)


def test_a_connection_cut_in_an_upload_is_overcome(online_hub, folder, waits):
    online_hub.faults.append(Fault(path="/_lfs/", method="PUT", after_bytes=100, times=1))
    push(folder, REPO)
    assert len(waits) == 1
    assert_is_the_folder(online_hub, folder)


def test_a_repeated_push_sends_only_what_is_missing(online_hub, folder, waits):
    """The log proves it: every large file is taken whole once, though the first push failed on one of them."""
    by_hash = {
        oid: path
        for path, ids in oids(contents(folder)).items()
        for oid in ids
        if path.endswith((".safetensors", ".png"))
    }
    bad = next(oid for oid, path in by_hash.items() if path == WEIGHTS[0] and len(oid) == 64)
    online_hub.faults.append(Fault(path=f"/_lfs/{bad}", method="PUT", after_bytes=100, times=6))
    text = refused("the connection.*broke.*run this again", folder, REPO)
    assert REPO in text
    assert {by_hash[oid] for oid in uploads(online_hub)} == set(by_hash.values()) - {WEIGHTS[0]}
    assert len(online_hub.commits(REPO)) == 1, "nothing is visible before the commit"
    online_hub.log.clear()
    push(folder, REPO)
    assert [by_hash[oid] for oid in uploads(online_hub)] == [WEIGHTS[0]]
    assert_is_the_folder(online_hub, folder)


def test_a_commit_of_somebody_else_meanwhile_is_not_overwritten(online_hub, folder, monkeypatch):
    preupload = HfApi.preupload_lfs_files

    def commit_of_another(self, repo_id, additions, **settings):
        preupload(self, repo_id, additions, **settings)
        monkeypatch.setattr(HfApi, "preupload_lfs_files", preupload)
        HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo="theirs.txt", repo_id=repo_id)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", commit_of_another)
    refused(f"somebody else committed to {REPO} meanwhile", folder, REPO)
    assert online_hub.files(REPO).keys() == {".gitattributes", "theirs.txt"}


def test_a_file_that_changes_during_the_push_is_noticed(online_hub, folder, monkeypatch):
    create_commit = HfApi.create_commit

    def then_edit(self, *arguments, **settings):
        done = create_commit(self, *arguments, **settings)
        (folder / "README.md").write_text(CARD + "edited meanwhile\n")
        return done

    monkeypatch.setattr(HfApi, "create_commit", then_edit)
    refused(rf"after the push {REPO} differs from the folder in \['README.md'\]", folder, REPO)


def test_a_tag_names_the_new_commit(online_hub, folder):
    done = push(folder, REPO, tag="v1")
    assert [(ref.name, ref.target_commit) for ref in HfApi().list_repo_refs(REPO).tags] == [
        ("v1", done.result.commit)
    ]


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_tag_that_is_taken_is_told_before_anything_is_sent(online_hub, folder, dry_run):
    push(folder, REPO, tag="v1")
    shorten(folder / "LICENSE-WEIGHTS")
    online_hub.log.clear()
    refused(f"{REPO} has a tag v1 already and nothing was sent", folder, REPO, tag="v1", dry_run=dry_run)
    assert [path for path in requests(online_hub, "POST", "PUT") if "create" not in path] == []


def test_a_pull_request_leaves_main_alone(online_hub, folder):
    done = push(folder, REPO, create_pr=True)
    assert online_hub.files(REPO).keys() == {".gitattributes"}
    assert_is_the_folder(online_hub, folder, "refs/pr/1")
    assert done.result.pr_url.endswith(f"{REPO}/discussions/1")


@pytest.mark.parametrize("settings", [{"tag": "v1"}, {"revision": "dev"}])
def test_a_pull_request_has_neither_tag_nor_branch(online_hub, folder, settings):
    refused("expected no revision and no tag", folder, REPO, create_pr=True, error=ValueError, **settings)
    assert requests(online_hub) == []


def test_a_new_branch_is_made_from_main(online_hub, folder):
    push(folder, REPO)
    main = online_hub.files(REPO)
    (folder / "README.md").write_text(CARD + "draft\n")
    done = push(folder, REPO, revision="draft")
    assert online_hub.files(REPO) == main
    assert_is_the_folder(online_hub, folder, "draft")
    assert {file.path for file in done.plan if file.action == "change"} == {"README.md"}


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_tag_or_a_commit_cannot_be_pushed_to(online_hub, folder, dry_run):
    commit = push(folder, REPO, tag="v1").result.commit
    for revision in ("v1", commit):
        refused("is a tag or a commit.*expected a branch", folder, REPO, revision=revision, dry_run=dry_run)


KILLED = """
import os, signal, sys
from pathlib import Path
from huggingface_hub import HfApi
from isic_vq.hub.transfer import push

HfApi.create_commit = lambda *arguments, **settings: os.kill(os.getpid(), signal.SIGKILL)
push(Path(sys.argv[1]), sys.argv[2])
"""


def test_a_push_killed_before_its_commit_leaves_the_repository_as_it_was(online_hub, hub_env, folder):
    push(folder, REPO)
    before = online_hub.files(REPO)
    change_weights(folder / WEIGHTS[0])
    online_hub.log.clear()
    done = subprocess.run([sys.executable, "-c", KILLED, folder, REPO], env={**os.environ, **hub_env})
    assert done.returncode == -signal.SIGKILL
    assert len(uploads(online_hub)) == 1, "it was killed after its upload"
    assert online_hub.files(REPO) == before
    online_hub.log.clear()
    push(folder, REPO)
    assert uploads(online_hub) == [], "what it left is used"
    assert_is_the_folder(online_hub, folder)


def test_a_card_with_a_number_that_no_report_has_is_refused(online_hub, tmp_path):
    folder = shutil.copytree(default_checkpoint(), tmp_path / "copy")
    push(folder, REPO, dry_run=True)  # premise: as it is shipped it may go
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nIts FID is 3.21.\n")
    refused("a number stands in a line .*3.21.*isic-vq card .*--check", folder, REPO, error=ModelError)
    assert requests(online_hub, "POST", "PUT") == []


def test_a_card_with_measurements_and_a_folder_without_reports_is_refused(online_hub, tmp_path):
    folder = shutil.copytree(default_checkpoint(), tmp_path / "copy")
    shutil.rmtree(folder / "reports")
    refused("has numbers, and the folder no reports", folder, REPO, error=ModelError)


def test_a_number_in_the_prose_of_a_folder_without_reports_is_refused(online_hub, folder):
    (folder / "README.md").write_text(CARD + "It generates images of 16 codes with FID 3.21.\n")
    refused("has numbers, and the folder no reports", folder, REPO, error=ModelError)


def test_a_repository_of_another_model_is_not_overwritten(online_hub, folder):
    api = HfApi()
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=b'{"model_type": "bert"}', path_in_repo="config.json", repo_id=REPO)
    before = online_hub.files(REPO)
    refused(f"{REPO} holds another model .model_type 'bert'.*nothing was sent", folder, REPO)
    assert online_hub.files(REPO) == before
