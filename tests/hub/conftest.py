"""A Hub for each test, for subprocesses by their environment and for this process by patches."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from fake_hub import FakeHub
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from repository_folder import write_repository

ADMIN_TOKEN = "hf_fake_admin"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A running Hub without repositories."""
    running = FakeHub().start()
    yield running
    running.stop()


@pytest.fixture
def hub_env(hub: FakeHub, tmp_path: Path) -> dict[str, str]:
    """Environment of a process that knows no other Hub, with caches of its own."""
    home = tmp_path / "hf-home"
    home.mkdir()
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": ADMIN_TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def online_hub(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """The Hub that huggingface_hub and transformers in this process reach, with a cache of the test's own."""
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hf-cache"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", ADMIN_TOKEN)
    close_session()  # a client that was made for the other address
    yield hub
    close_session()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository folder: not to be changed."""
    return write_repository(tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A repository folder of the test's own."""
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that retries would have waited; they go on at once. Locks, which wait for less, do wait."""
    seconds: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda wait: seconds.append(wait) if wait >= 1 else sleep(wait))
    return seconds
