"""Files and folders arrive whole or not at all, and nothing half-made is left behind."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from isic_vq.files import beside, replaced_directory, write_atomically, write_tensors


def full_disk(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def target(tmp_path):
    """A folder with one file, as an earlier run left it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    return folder


def test_write_makes_the_folders_it_needs_and_leaves_one_file(tmp_path):
    write_atomically(tmp_path / "a" / "b" / "file.bin", b"new")
    assert contents(tmp_path / "a" / "b") == {"file.bin": b"new"}


def test_write_replaces_the_old_content(tmp_path):
    for content in (b"a longer old content", b"new"):
        write_atomically(tmp_path / "file.bin", content)
    assert contents(tmp_path) == {"file.bin": b"new"}


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_full_disk_leaves_the_old_file_and_no_leftover(tmp_path, monkeypatch, where):
    write_atomically(tmp_path / "file.bin", b"old")
    monkeypatch.setattr(os, where, full_disk)
    with pytest.raises(OSError, match=r"No space left.*file\.bin'"):
        write_atomically(tmp_path / "file.bin", b"new")
    assert contents(tmp_path) == {"file.bin": b"old"}


def test_filled_folder_takes_the_place_of_the_old_one(tmp_path, target):
    with replaced_directory(target) as folder:
        assert list(folder.iterdir()) == [], "the new folder starts empty: nothing of the old one may mix in"
        (folder / "new.txt").write_text("new")
        assert contents(target) == {"old.txt": b"old"}, (
            "until the block ends the old folder is what others see"
        )
    assert contents(target) == {"new.txt": b"new"}
    assert list(tmp_path.iterdir()) == [target]


def test_folder_that_did_not_exist_is_made_with_its_parents(tmp_path):
    with replaced_directory(tmp_path / "a" / "model") as folder:
        (folder / "new.txt").write_text("new")
    assert contents(tmp_path / "a" / "model") == {"new.txt": b"new"}


def fail_half_way(target, error):
    with replaced_directory(target) as folder:
        (folder / "half.txt").write_text("half")
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_error_in_the_block_leaves_the_old_folder_and_no_leftover(tmp_path, target, error):
    with pytest.raises(type(error)):
        fail_half_way(target, error)
    assert contents(target) == {"old.txt": b"old"}
    assert list(tmp_path.iterdir()) == [target]


def test_error_while_renaming_brings_the_old_folder_back(tmp_path, target, monkeypatch):
    rename = type(target).rename

    def fail_for_the_new_one(self, new_name):
        if (self / "new.txt").exists():
            full_disk()
        return rename(self, new_name)

    monkeypatch.setattr(type(target), "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="No space left"), replaced_directory(target) as folder:
        (folder / "new.txt").write_text("new")
    assert contents(target) == {"old.txt": b"old"}
    assert list(tmp_path.iterdir()) == [target]


def test_leftovers_of_a_killed_process_do_not_get_in_the_way(tmp_path, target):
    for suffix in ("tmp", "old"):
        leftover = beside(target, suffix)
        leftover.mkdir()
        (leftover / "half.txt").write_text("half")
    with replaced_directory(target) as folder:
        (folder / "new.txt").write_text("new")
    assert contents(target) == {"new.txt": b"new"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_whose_process_died_between_the_renames_comes_back(tmp_path):
    target = tmp_path / "folder"
    old = beside(target, "old")
    old.mkdir()
    (old / "kept").write_text("")
    with pytest.raises(KeyboardInterrupt), replaced_directory(target):
        raise KeyboardInterrupt
    assert (target / "kept").is_file()


def test_tensors_are_written_with_the_mode_that_the_umask_gives(tmp_path):
    tensors = {"a": torch.arange(3), "b": torch.rand(2, 2)}
    old = os.umask(0o026)
    try:
        write_tensors(tmp_path / "arrays" / "t.safetensors", tensors)
    finally:
        os.umask(old)
    read = load_file(tmp_path / "arrays" / "t.safetensors")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    assert (tmp_path / "arrays" / "t.safetensors").stat().st_mode & 0o777 == 0o640
