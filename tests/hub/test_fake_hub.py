"""The server of these tests behaves as the Hub does, as far as the tests rely on it."""

import hashlib
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import httpx2
import pytest
from fake_hub import Fault
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "user/tiny"
LARGE, SMALL = b"large file " * 1000, b"{}\n"


@pytest.fixture
def api(online_hub):
    """A client of the owner, with a repository of a large and a small file."""
    api = HfApi()
    api.create_repo(REPO)
    files = {"vqvae/model.safetensors": LARGE, "config.json": SMALL}
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    api.create_commit(REPO, operations, commit_message="first")
    return api


def test_files_are_listed_with_the_hashes_of_git_and_of_large_files(api, online_hub):
    small = hashlib.sha1(b"blob %d\0" % len(SMALL) + SMALL).hexdigest()
    large = hashlib.sha256(LARGE).hexdigest()
    hashes = online_hub.files(REPO)
    assert (hashes["config.json"], hashes["vqvae/model.safetensors"]) == (small, large)
    listed = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True)}
    assert listed["config.json"].blob_id == small
    assert listed["vqvae/model.safetensors"].lfs.sha256 == large
    assert listed["vqvae/model.safetensors"].size == len(LARGE)
    assert "vqvae" in listed, "folders are listed, too"


def test_what_is_downloaded_is_what_was_uploaded(api):
    for path, content in {"vqvae/model.safetensors": LARGE, "config.json": SMALL}.items():
        with open(hf_hub_download(REPO, path), "rb") as file:
            assert file.read() == content


def test_a_part_of_a_file_is_sent_on_request(api, online_hub):
    address = f"{online_hub.url}/{REPO}/resolve/main/vqvae/model.safetensors"
    answer = httpx2.get(address, headers={"Range": "bytes=100-199"})
    assert (answer.status_code, answer.content) == (206, LARGE[100:200])


@pytest.mark.parametrize("path", ["vqvae/model.safetensors", "config.json"])
def test_a_file_comes_with_its_hash_and_commit(api, online_hub, path):
    answer = httpx2.head(f"{online_hub.url}/{REPO}/resolve/main/{path}")
    assert answer.headers["X-Repo-Commit"] == online_hub.commits(REPO)[0]
    assert answer.headers["ETag"] == f'"{online_hub.files(REPO)[path]}"'
    assert int(answer.headers["Content-Length"]) == len(online_hub.read(REPO, path))


def test_a_commit_deletes_and_keeps_the_past(api, online_hub):
    api.create_commit(REPO, [CommitOperationDelete("config.json")], commit_message="second")
    assert "config.json" not in online_hub.files(REPO)
    before = online_hub.commits(REPO)[1]
    assert "config.json" in online_hub.files(REPO, before)


def test_a_commit_on_an_old_parent_is_refused(api, online_hub):
    old = online_hub.commits(REPO)[1]
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(REPO, [CommitOperationAdd("a", b"a")], commit_message="late", parent_commit=old)


def test_tags_and_branches_name_commits(api, online_hub):
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="trial")
    api.create_commit(REPO, [CommitOperationAdd("a", b"a")], commit_message="on trial", revision="trial")
    assert "a" in online_hub.files(REPO, "trial")
    assert "a" not in online_hub.files(REPO, "v1")
    assert {ref.name for ref in api.list_repo_refs(REPO).branches} == {"main", "trial"}
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPO, revision="v2")


def test_a_pull_request_waits_to_be_merged(api, online_hub):
    proposal = api.create_commit(
        REPO, [CommitOperationAdd("a", b"a")], commit_message="please", create_pr=True
    )
    assert proposal.pr_url == f"{online_hub.url}/{REPO}/discussions/1"
    refs = api.list_repo_refs(REPO, include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests] == [("refs/pr/1", proposal.oid)]
    assert "a" not in online_hub.files(REPO)
    api.merge_pull_request(REPO, 1)
    assert "a" in online_hub.files(REPO)


def test_a_private_repository_does_not_exist_for_others(api, online_hub):
    online_hub.repos[REPO].private = True
    for token, status in {"hf_fake_other": 404, False: 401}.items():
        with pytest.raises(RepositoryNotFoundError) as caught:
            api.repo_info(REPO, token=token)
        assert caught.value.response.status_code == status
    assert api.repo_info(REPO).private


def test_a_gated_repository_is_seen_and_not_downloaded(api, online_hub):
    online_hub.repos[REPO].gated = True
    for token, status in {"hf_fake_other": 403, False: 401}.items():
        assert api.repo_info(REPO, token=token).gated
        with pytest.raises(GatedRepoError) as caught:
            hf_hub_download(REPO, "config.json", token=token)
        assert caught.value.response.status_code == status
    with open(hf_hub_download(REPO, "config.json"), "rb") as file:
        assert file.read() == SMALL


@pytest.mark.parametrize("token", ["hf_fake_other", "hf_unknown", False])
def test_only_the_owner_writes(api, token):
    with pytest.raises(HfHubHTTPError, match="401|403"):
        api.create_commit(REPO, [CommitOperationAdd("a", b"a")], commit_message="mine", token=token)


def test_a_card_with_broken_metadata_is_refused(api):
    card = CommitOperationAdd("README.md", b"---\ntags: no list\n---\n")
    with pytest.raises(ValueError, match="tags"):
        api.create_commit(REPO, [card], commit_message="card")


def test_the_cards_metadata_are_the_repositorys(api):
    card = ModelCard("---\nlibrary_name: transformers\npipeline_tag: image-to-image\n---\n")
    api.create_commit(REPO, [CommitOperationAdd("README.md", card.content.encode())], commit_message="card")
    info = api.model_info(REPO)
    assert (info.library_name, info.pipeline_tag) == ("transformers", "image-to-image")


def test_a_fault_happens_as_often_as_it_says(api, online_hub):
    online_hub.faults.append(Fault(path="/api/models/", status=418, times=2))
    address = f"{online_hub.url}/api/models/{REPO}"
    assert [httpx2.get(address).status_code for _ in range(3)] == [418, 418, 200]


def test_a_fault_is_for_its_method_and_path_only(api, online_hub):
    online_hub.faults.append(Fault(path="config.json", method="HEAD", status=503))
    address = f"{online_hub.url}/{REPO}/resolve/main"
    assert httpx2.get(f"{address}/config.json").status_code == 200
    assert httpx2.head(f"{address}/vqvae/model.safetensors").status_code == 200
    assert httpx2.head(f"{address}/config.json").status_code == 503


def test_a_status_comes_with_the_headers_of_its_fault(api, online_hub):
    online_hub.faults.append(Fault(path=REPO, status=429, headers={"Retry-After": "7"}))
    answer = httpx2.get(f"{online_hub.url}/api/models/{REPO}")
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")
    online_hub.faults.append(Fault(path=REPO, status=404, headers={"X-Error-Code": "RepoNotFound"}))
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info(REPO)


def test_a_corrupt_file_has_one_bit_flipped(api, online_hub):
    online_hub.faults.append(Fault(path="config.json", corrupt=True))
    address = f"{online_hub.url}/{REPO}/resolve/main/config.json"
    flipped, sound = httpx2.get(address).content, httpx2.get(address).content
    assert sound == SMALL
    assert sum((a ^ b).bit_count() for a, b in zip(flipped, sound, strict=True)) == 1


def test_a_fault_waits_for_a_file_that_has_bits_to_flip(api, online_hub):
    api.create_commit(REPO, [CommitOperationAdd("empty", b"")], commit_message="empty")
    online_hub.faults.append(Fault(path="/resolve/", corrupt=True))
    assert httpx2.get(f"{online_hub.url}/{REPO}/resolve/main/empty").content == b""
    assert httpx2.get(f"{online_hub.url}/{REPO}/resolve/main/config.json").content != SMALL


def test_a_cut_download_ends_early(api, online_hub):
    online_hub.faults.append(Fault(path="safetensors", after_bytes=100))
    with pytest.raises(httpx2.RemoteProtocolError, match="received 100 bytes"):
        httpx2.get(f"{online_hub.url}/{REPO}/resolve/main/vqvae/model.safetensors")


def test_asking_for_the_size_first_does_not_use_up_a_cut(api, online_hub):
    online_hub.faults.append(Fault(path="safetensors", after_bytes=100))
    address = f"{online_hub.url}/{REPO}/resolve/main/vqvae/model.safetensors"
    assert int(httpx2.head(address).headers["Content-Length"]) == len(LARGE)
    with pytest.raises(httpx2.RemoteProtocolError, match="received 100 bytes"):
        httpx2.get(address)


@pytest.mark.parametrize("after_bytes", [0, 100, 10**6], ids=["at once", "in the middle", "after the body"])
def test_a_cut_upload_stores_nothing(online_hub, after_bytes):
    online_hub.faults.append(Fault(path="/_lfs/", after_bytes=after_bytes))
    oid = hashlib.sha256(LARGE).hexdigest()
    address = f"{online_hub.url}/_lfs/{oid}"
    with pytest.raises((httpx2.RemoteProtocolError, httpx2.NetworkError)):
        httpx2.put(address, content=LARGE, timeout=5)
    assert oid not in online_hub.large_files
    assert httpx2.put(address, content=LARGE).status_code == 200
    assert online_hub.large_files[oid] == LARGE


def test_a_large_file_must_have_the_hash_that_it_is_announced_with(online_hub):
    assert httpx2.put(f"{online_hub.url}/_lfs/{'0' * 64}", content=LARGE).status_code == 400
    assert online_hub.large_files == {}


@pytest.mark.parametrize("path", ["../evil.py", "/abs.py", "a/../../b.py", "C:\\x.py"])
def test_a_hostile_path_is_listed_and_served(api, online_hub, path):
    online_hub.add_hostile_entry(REPO, path)
    assert path in {entry.path for entry in api.list_repo_tree(REPO, recursive=True)}
    assert path in {sibling.rfilename for sibling in api.model_info(REPO).siblings}
    answer = httpx2.get(f"{online_hub.url}/{REPO}/resolve/main/{quote(path, safe='')}")
    assert answer.content == online_hub.read(REPO, path)


def test_requests_are_logged(api, online_hub):
    assert ("POST", f"/api/models/{REPO}/commit/main") in {(e.method, e.path) for e in online_hub.log}


def test_downloads_of_this_process_go_to_a_cache_of_the_test(api, tmp_path):
    snapshot = Path(snapshot_download(REPO))
    assert snapshot.is_relative_to(tmp_path)
    assert (snapshot / "vqvae" / "model.safetensors").read_bytes() == LARGE


def test_a_process_with_the_environment_reaches_this_hub_alone(hub, hub_env, tmp_path):
    hub.create(REPO)
    script = "from huggingface_hub import hf_hub_download, whoami; print(whoami()['name']); "
    script += f"print(hf_hub_download('{REPO}', '.gitattributes'))"
    command = [sys.executable, "-c", script]
    user, path = subprocess.run(
        command, env=hub_env, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert user == "user"
    assert Path(path).is_relative_to(tmp_path)
    assert Path(path).read_bytes() == hub.read(REPO, ".gitattributes")


def test_it_runs_by_itself_and_says_how_to_reach_it():
    command = [sys.executable, __file__.replace("test_fake_hub", "fake_hub"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        first = server.stdout.readline()
        server.kill()
    assert first.startswith("export HF_ENDPOINT=")
