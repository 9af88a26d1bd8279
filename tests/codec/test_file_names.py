from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isic_vq.codec.container import CodecError, check_names, png_paths

ESCAPES = [
    "../evil",
    "a/../../evil",
    "/etc/evil",
    "a//b",
    "",
    ".",
    "..",
    "a/",
    "c:evil",
    "a\\..\\b",
    "a\0b",
    "a\nb",
]


@pytest.mark.parametrize("name", ESCAPES, ids=repr)
def test_a_name_that_leaves_the_folder_is_refused(name, tmp_path):
    with pytest.raises(CodecError, match="expected a relative path"):
        png_paths(["sound.jpg", name], tmp_path)


@given(st.lists(st.text(st.sampled_from("ab./\\: \0é"), max_size=8), max_size=4))
def test_every_path_that_is_given_lies_in_the_folder_and_is_another_one(names):
    folder = Path("out")
    try:
        paths = png_paths(names, folder)
    except CodecError:
        return
    assert len(set(paths)) == len(names)
    assert all(path.resolve().is_relative_to(folder.resolve()) for path in paths)


def test_a_link_that_leads_out_of_the_folder_is_not_followed(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(CodecError, match="outside of out"):
        png_paths(["link/evil"], folder)


def test_images_are_written_as_pngs_of_their_names():
    paths = png_paths(["a/1.jpg", "2.v2", "3.PNG"], Path("out"))
    assert paths == [Path("out/a/1.png"), Path("out/2.v2.png"), Path("out/3.png")]


def test_names_that_differ_in_their_suffix_keep_it():
    paths = png_paths(["a.jpg", "a.png", "b.jpg"], Path("out"))
    assert paths == [Path("out/a.jpg.png"), Path("out/a.png.png"), Path("out/b.jpg.png")]


def test_two_images_of_one_name_are_refused():
    with pytest.raises(CodecError, match="two images are called 'a'"):
        check_names(["a", "b", "a"])
