"""Opening a model from a Hub that fails, or that serves what it should not: one clear error, and nothing half-read."""

import pytest
import torch
from fake_hub import Fault
from huggingface_hub import HfApi
from repository_folder import WEIGHTS
from safetensors.torch import load_file, save_file

from isic_vq import IsicVQModel
from isic_vq.hub.pretrained import ModelError, load_model
from isic_vq.models.upload import HubError

REPO = "user/tiny"
OTHERS_TOKEN = "hf_fake_other"


@pytest.fixture
def serve(online_hub, folder, waits):
    """Put the folder on the Hub as it is now; retries go on at once."""

    def upload():
        api = HfApi()
        api.create_repo(REPO)
        api.upload_folder(repo_id=REPO, folder_path=folder)
        return online_hub

    return upload


def change_tensors(folder, change):
    path = folder / WEIGHTS[1]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def assert_opens(folder):
    """What failed before opens now, with the folder's weights: nothing wrong was kept."""
    opened, expected = load_model(IsicVQModel, REPO), load_model(IsicVQModel, str(folder))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, "the Hub refuses your token for user/tiny"),
        (403, "your token may not do this with user/tiny"),
        (404, "the Hub refuses what was asked of user/tiny .status 404"),
        (429, "the Hub limits requests, user/tiny has to wait: run this again in 7 seconds"),
        (503, "the Hub is in trouble .status 503. and user/tiny was not completed"),
    ],
)
def test_a_status_is_one_sentence_and_the_next_try_succeeds(serve, folder, status, text):
    hub = serve()
    fault = Fault(path="/resolve/|/api/models/", status=status, times=99, headers={"Retry-After": "7"})
    hub.faults.append(fault)
    with pytest.raises(HubError, match=text) as caught:
        load_model(IsicVQModel, REPO)
    assert "\n" not in str(caught.value)
    assert "hf_fake" not in str(caught.value)
    hub.faults.clear()
    assert_opens(folder)


def test_a_cut_download_is_one_sentence_and_the_next_try_succeeds(serve, folder):
    hub = serve()
    hub.faults.append(Fault(path="safetensors$", method="GET", after_bytes=100, times=99))
    with pytest.raises(HubError, match="the connection to .* broke while working on user/tiny"):
        load_model(IsicVQModel, REPO)
    hub.faults.clear()
    assert_opens(folder)


def test_a_download_that_is_cut_once_goes_on_by_itself(serve, folder):
    hub = serve()
    hub.faults.append(Fault(path="safetensors$", method="GET", after_bytes=100, times=1))
    assert_opens(folder)
    assert hub.faults[0].times == 0, "premise: the cut happened"


@pytest.mark.parametrize("load", [load_model, lambda model_class, name: model_class.from_pretrained(name)])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("user/none", "user/none does not exist, or your token may not see it"),
        ("user/ti--ny", "'user/ti--ny' is no repository: expected user/name"),
    ],
)
def test_a_name_that_is_no_repository_is_refused(online_hub, load, name, text):
    with pytest.raises(HubError, match=text):
        load(IsicVQModel, name)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("private", "user/tiny does not exist, or your token may not see it"),
        ("gated", "user/tiny is gated: ask for access at"),
    ],
)
def test_a_repository_that_is_not_for_everybody_says_whom_to_ask(serve, monkeypatch, kind, text):
    setattr(serve().repos[REPO], kind, True)
    monkeypatch.setenv("HF_TOKEN", OTHERS_TOKEN)
    with pytest.raises(HubError, match=text):
        load_model(IsicVQModel, REPO)


def test_a_truncated_weights_file_is_refused(serve, folder):
    path = folder / WEIGHTS[1]
    path.write_bytes(path.read_bytes()[:-40])
    serve()
    with pytest.raises(ModelError, match="a weights file of user/tiny is damaged .*: download it again"):
        load_model(IsicVQModel, REPO)


def test_foreign_tensors_are_refused_by_name(serve, folder):
    change_tensors(folder, lambda tensors: tensors.update({"prior.junk": torch.zeros(2)}))
    serve()
    with pytest.raises(ModelError, match=r"user/tiny is not a whole isic_vq: .* such as \['prior.junk'\]"):
        load_model(IsicVQModel, REPO)


def test_missing_tensors_are_refused_by_name(serve, folder):
    change_tensors(folder, lambda tensors: tensors.pop("prior.position_embedding"))
    serve()
    with pytest.raises((ModelError, OSError), match="position_embedding"):
        load_model(IsicVQModel, REPO)


def test_a_hostile_path_in_the_listing_is_written_nowhere(serve, folder, tmp_path):
    serve().add_hostile_entry(REPO, "../../evil.py")
    assert_opens(folder)
    assert list(tmp_path.rglob("*evil*")) == []
