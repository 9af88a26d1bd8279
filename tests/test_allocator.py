"""Freed memory stays in the process where glibc allows it: page faults counted in processes of their own."""

import json
import platform
import subprocess
import sys

import pytest

from isic_vq.allocator import SWITCH, keep_freed_memory

FAULTS = """
import json, resource
import isic_vq, isic_vq.cli
from isic_vq.allocator import keep_freed_memory

def faults():
    bytearray(96 << 20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        bytearray(96 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(json.dumps([faults(), keep_freed_memory(), faults()]))
"""


def counted(monkeypatch, switch):
    monkeypatch.setenv(SWITCH, switch)
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has these settings")
def test_pages_are_cleared_once_when_asked_for_and_not_by_importing_the_package(monkeypatch):
    imported, was_set, kept = counted(monkeypatch, "1")
    assert was_set
    assert imported > 100, "importing the package changes nothing"
    assert kept < imported / 20
    before, was_set, after = counted(monkeypatch, "0")
    assert not was_set
    assert after > before / 2


def test_another_setting_is_refused(monkeypatch):
    monkeypatch.setenv(SWITCH, "yes")
    with pytest.raises(ValueError, match="ISIC_VQ_KEEP_MEMORY is 'yes': expected 1"):
        keep_freed_memory()


def test_commands_and_trainings_ask_for_it(run, monkeypatch, tmp_path):
    from isic_vq.training.processes import Processes
    from isic_vq.training.recipe import LoopRecipe

    monkeypatch.setenv(SWITCH, "yes")
    code, _, err = run("--version")
    assert code == 1
    assert "ISIC_VQ_KEEP_MEMORY is 'yes'" in err
    with pytest.raises(ValueError, match="ISIC_VQ_KEEP_MEMORY"):
        Processes(LoopRecipe(precision="fp32"), tmp_path)
