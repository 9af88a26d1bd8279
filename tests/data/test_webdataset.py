"""Tar files in the WebDataset layout: what each member says, whole tars only, and names that are never paths."""

import io
import json
import tarfile

import pytest
from fault_server import FaultServer

from isic_vq.data.classes import Classes
from isic_vq.data.schema import DataError
from isic_vq.data.shards import Sample, to_png, write_shard
from isic_vq.data.sites import canonical_site
from isic_vq.data.sources import describe_source, find_source, open_source
from isic_vq.data.synthetic_images import synthetic_metadata, synthetic_record
from isic_vq.data.uri import expand_braces
from source_contract import CONTRACT, rows_of


def _write_tar(path, members):
    """Write (name, content) pairs; a content of None makes a symbolic link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            member.size = len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))
    return path


def _png(index):
    return synthetic_record(index, 0)["image"]["bytes"]


def _members(first, last):
    """Synthetic records as samples of an image and its metadata."""
    found = []
    for index in range(first, last):
        metadata = synthetic_metadata(index, 0)
        found += [(f"{metadata['isic_id']}.png", _png(index))]
        found += [(f"{metadata['isic_id']}.json", json.dumps(metadata).encode())]
    return found


@pytest.fixture
def tars(tmp_path):
    for number in range(4):
        _write_tar(tmp_path / "shards" / f"a-{number:02d}.tar", _members(5 * number, 5 * number + 5))
    return tmp_path / "shards"


@pytest.mark.parametrize("holds", CONTRACT)
def test_tars_keep_the_contract(holds, tars):
    holds(find_source(f"webdataset:{tars}/a-{{00..03}}.tar"))


def test_records_come_back_value_by_value(tars):
    rows = [synthetic_metadata(index, 0) for index in range(20)]
    assert rows_of(open_source(f"webdataset:{tars}", streaming=True)) == [
        {**row, "image": _png(index), "site": canonical_site(row["site"])} for index, row in enumerate(rows)
    ]


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("webdataset:{dir}", 20),
        ("{dir}", 20),
        ("{dir}/a-01.tar", 5),
        ("webdataset:{dir}/a-*.tar", 20),
        ("webdataset:{dir}/a-{{02,00}}.tar", 10),
        ("webdataset:$SHARDS/a-{{01..03}}.tar", 15),
        ("webdataset:${{SHARDS}}/a-00.tar", 5),
    ],
)
def test_tars_are_found_by_directory_path_pattern_and_braces(target, count, tars, monkeypatch):
    monkeypatch.setenv("SHARDS", str(tars))
    assert len(list(find_source(target.format(dir=tars)).metadata())) == count


def test_braces_are_written_out_as_in_a_shell():
    assert expand_braces("{train,test}-{08..10}.tar") == [
        f"{split}-{number}.tar" for split in ("train", "test") for number in ("08", "09", "10")
    ]
    assert expand_braces("${DIR}/{a}/x.tar") == ["${DIR}/{a}/x.tar"]
    for pattern in ("{3..1}", "{0..100000}"):
        with pytest.raises(DataError, match="no range of up to 100000 names"):
            expand_braces(pattern)


def test_generated_shards_read_back(tmp_path):
    import numpy as np

    samples = [
        Sample(
            image=to_png(np.full((8, 8, 3), index, np.uint8)),
            label=label,
            seed=3,
            index=index,
            codes=[1, 2],
            model="m",
            isic_vq="0",
            run="r",
        )
        for index, label in enumerate(["melanoma", None])
    ]
    write_shard(tmp_path / "images-00000-of-00001.tar", samples, ["melanoma"])
    rows = rows_of(open_source(str(tmp_path), streaming=True))
    assert [(row["isic_id"], row["diagnosis"], row["image"]) for row in rows] == [
        ("00000000", "melanoma", samples[0].image),
        ("00000001", "unknown", samples[1].image),
    ]


def test_suffixes_say_what_a_member_is(tmp_path):
    tar = _write_tar(
        tmp_path / "a.tar",
        [
            ("README.txt", b"about"),
            ("./one.PNG", _png(0)),
            ("./one.cls", b"3\n"),
            ("./one.txt", b"caption"),
            ("./one.seg.png", b"mask"),
            ("two.json", b'{"dx": "nv", "age_approx": 50, "localization": "ear"}'),
            ("two.cls", b"NV"),
            ("two.jpeg", b"broken"),
            ("MEL/three.png", _png(1)),
            ("MEL/._three.png", b"finder"),
            ("four.json", b"{}"),
        ],
    )
    rows = rows_of(open_source(str(tar), streaming=True))
    assert [(row["isic_id"], row["diagnosis"], row["image"]) for row in rows] == [
        ("one", "actinic_keratosis", _png(0)),
        ("two", "nevus", b"broken"),
        ("three", "melanoma", _png(1)),
        ("four", "unknown", None),
    ]
    assert (rows[1]["age"], rows[1]["site"]) == (50.0, "head/neck")


def test_metadata_do_not_read_the_images(tmp_path):
    """The image's bytes may be anything, and only what stands around them is read."""
    tar = _write_tar(tmp_path / "a.tar", [("a.png", bytes(4 << 20)), ("a.json", b'{"dx": "nv"}')])
    source = find_source(str(tar))
    reads = []

    class Counting(io.BufferedReader):
        def read(self, size=-1):
            content = super().read(size)
            reads.append(len(content))
            return content

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", lambda path, mode: Counting(io.FileIO(path)))
        rows = list(source.metadata())
    assert [row["diagnosis"] for row in rows] == ["nevus"]
    assert 0 < sum(reads) < 16 * 1024


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"1"), ("b.png", b"2"), ("a.json", b"{}")], "bad.tar: the sample a comes twice"),
        ([("a.png", b"1"), ("a.png", b"2")], r"bad.tar: a.png comes twice; keep one"),
        ([("a.png", b"1"), ("a.jpg", b"2")], r"bad.tar, sample a has 2 images \(png, jpg\); keep one"),
        ([("a.png", None)], "bad.tar: a.png is a link or device; write the image itself"),
        ([("a.png", b"1"), ("a.json", b"[1]")], "sample a, json is a list; expected one JSON object"),
        ([("a.png", b"1"), ("a.json", b"{")], "sample a, json is not JSON"),
        ([("a.png", b"1"), ("a.cls", b"17")], "'17' .*is not a known class"),
        ([("a.json", b'{"dx": "nv"}'), ("a.cls", b"mel")], "json says nevus, cls mel; correct one"),
        ([("a.json", b'{"dx": "wart"}')], r"bad.tar.*'wart' .*is not a known class"),
    ],
)
def test_what_is_no_sample_is_named(members, message, tmp_path):
    source = find_source(str(_write_tar(tmp_path / "bad.tar", members)))
    with pytest.raises(DataError, match=message):
        rows_of(source.stream())
    with pytest.raises(DataError, match=message):
        list(source.metadata())


@pytest.mark.parametrize("metadata_only", [False, True])
def test_tar_cut_anywhere_is_refused_after_its_sound_samples(metadata_only, tmp_path):
    """The sample before the cut counts once another one, or the end, has begun behind it."""
    members = [("a.png", bytes(700)), ("a.json", b"{}"), ("b.png", bytes(700))]
    whole = _write_tar(tmp_path / "whole.tar", members).read_bytes()
    sound_by_size = {0: 0, 512: 0, 1536: 0, 2048: 0, 2559: 0, 2560: 0, 3000: 0, 3072: 1, 3500: 1, 4096: 1}
    cut = tmp_path / "cut.tar"
    for size, sound in sound_by_size.items():
        cut.write_bytes(whole[:size])
        source = find_source(str(cut))
        rows = iter(source.metadata() if metadata_only else source.read(str(cut)))
        assert [next(rows)["isic_id"] for _ in range(sound)] == ["a"] * sound
        with pytest.raises(
            DataError, match=f"cut.tar is not a whole tar file .* {sound} sound samples come before"
        ):
            next(rows)


def test_other_files_are_no_tars(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match="a.tar is not a whole tar file .* gunzip it if it is compressed"):
        list(open_source(f"{tmp_path}/a.tar", streaming=True))


def test_names_of_members_are_never_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tar = _write_tar(tmp_path / "a.tar", [("../../evil.png", _png(0)), ("/etc/evil.png", _png(1))])
    before = set(tmp_path.parent.rglob("*"))
    rows = rows_of(open_source(str(tar), streaming=True, classes=Classes.parse("none")))
    assert [row["isic_id"] for row in rows] == ["evil", "/etc/evil"]
    assert set(tmp_path.parent.rglob("*")) == before


def test_fingerprint_follows_content_and_not_names(tars, tmp_path):
    before = describe_source(str(tars))
    (tars / "a-00.tar").rename(tars / "z-00.tar")
    assert describe_source(str(tars)).fingerprint == before.fingerprint
    _write_tar(tars / "z-00.tar", _members(20, 25))
    after = describe_source(str(tars))
    assert after.fingerprint != before.fingerprint
    assert before.name == "webdataset:shards"
    assert str(tmp_path) not in repr(before)


def test_rewritten_tar_is_read_again(tmp_path):
    tar = _write_tar(tmp_path / "a.tar", _members(0, 2))
    assert open_source(str(tar)).num_rows == 2
    _write_tar(tar, _members(0, 3))
    assert open_source(str(tar))["isic_id"][:] == [
        synthetic_metadata(index, 0)["isic_id"] for index in range(3)
    ]


def test_error_of_a_tar_is_the_same_with_random_access(tmp_path):
    tar = _write_tar(tmp_path / "a.tar", [("a.json", b'{"dx": "wart"}')])
    with pytest.raises(DataError, match=r"'wart' \(1 image\) is not a known class"):
        open_source(str(tar))


def test_missing_tars_are_named(tars):
    with pytest.raises(
        DataError, match=r"Nothing matches a-04.tar of webdataset:a-\{03..04\}.tar. Expected a tar"
    ):
        find_source(f"webdataset:{tars}/a-{{03..04}}.tar")


@pytest.fixture
def remote(tars, monkeypatch):
    """The tars behind a server, and retries that do not wait."""
    monkeypatch.setenv("ISIC_VQ_BACKOFF", "0.001")
    monkeypatch.setenv("ISIC_VQ_READ_TIMEOUT", "20")  # a busy machine must not look like a fault
    with FaultServer({f"/{path.name}": path.read_bytes() for path in tars.glob("*.tar")}) as server:
        yield server


@pytest.mark.parametrize("holds", CONTRACT)
def test_tars_over_http_keep_the_contract(holds, remote):
    holds(find_source(f"webdataset:{remote.url}/a-{{00..03}}.tar"))


@pytest.mark.parametrize("kind", ["429", "503", "cut", "reset", "slow", "stall"])
def test_every_sample_comes_once_whatever_the_connection_does(kind, remote, monkeypatch):
    if kind == "stall":
        monkeypatch.setenv("ISIC_VQ_READ_TIMEOUT", "1")
    for after in (0, 2, 3):  # the size is asked for, and the content by ranges
        remote.fail("/a-", kind, times=1, after=after)
    source = find_source(f"webdataset:{remote.url}/a-{{00..03}}.tar")
    assert [row["image"] for row in rows_of(source.stream())] == [_png(index) for index in range(20)]


def test_truncated_remote_tar_is_refused(remote):
    whole = remote.files["/a-00.tar"]
    remote.files["/a-00.tar"] = whole[: len(whole) // 2]
    source = find_source(f"webdataset:{remote.url}/a-00.tar")
    with pytest.raises(DataError, match=r"a-00.tar is not a whole tar file .* 2 sound samples come before"):
        rows_of(source.stream())


def test_remote_fingerprint_follows_the_server_and_tells_no_secret(remote):
    uri = f"webdataset:{remote.url.replace('//', '//user:password@')}/a-00.tar?signature=secret"
    info = find_source(uri).name
    assert "password" not in info
    assert "secret" not in info
    source = find_source(f"webdataset:{remote.url}/a-00.tar")
    before = source.fingerprint()
    remote.files["/a-00.tar"] = remote.files["/a-01.tar"]
    assert source.fingerprint() != before


def test_missing_remote_tar_is_one_error(remote):
    with pytest.raises(DataError, match="/none.tar"):
        rows_of(find_source(f"webdataset:{remote.url}/none.tar").stream())
