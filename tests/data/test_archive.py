"""The ISIC archive as a source, read from a server on this machine that fails."""

import io
import logging
import re

import pyarrow.parquet
import pytest
from archive_server import DIAGNOSES, SITES, SNAPSHOT_TIME, ArchiveServer, is_synthetic

from isic_vq.data.loading import iter_batches
from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source
from isic_vq.data.sources.archive import IMAGES_PER_PART, ArchiveFilters
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from source_contract import (
    assert_metadata_are_the_rows_without_images,
    assert_pickled_source_reads_the_same,
    assert_processes_share_the_rows,
    assert_stream_resumes_exactly,
    rows_of,
)

NUMBER = 150
REAL = pytest.param(True, marks=pytest.mark.real_data)


@pytest.fixture(params=[False, REAL])
def server(request, monkeypatch):
    if request.param:
        request.getfixturevalue("data_dir")
    with ArchiveServer(NUMBER, request.param) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def plain(monkeypatch):
    with ArchiveServer(NUMBER) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        yield server


def wanted(server, let_pass=lambda row: True):
    """Numbers of the images that a filter should let pass."""
    return [i for i, row in enumerate(server.rows) if not is_synthetic(i) and let_pass(row)]


def ids(numbers):
    return [f"ISIC_{number:07d}" for number in numbers]


@pytest.mark.parametrize("kind", ["429", "503", "cut", "reset", "slow", "stall"])
@pytest.mark.parametrize("uri", ["isic-archive:", "isic-archive:collection=77"])
def test_every_image_comes_once_whatever_fails(uri, kind, server, monkeypatch):
    server.stall_seconds = 1.0
    if kind == "stall":
        monkeypatch.setenv("ISIC_VQ_READ_TIMEOUT", "0.5")
    for path in (
        "/bucket/snapshots",
        "/api",
        "/bucket/thumbnails/ISIC_0000003",
        "/bucket/thumbnails/ISIC_0000060",
    ):
        server.fail(path, kind)
    rows = rows_of(find_source(uri).stream())
    expected = [i for i in wanted(server) if "77" not in uri or i % 3 == 0]
    assert [row["isic_id"] for row in rows] == ids(expected)
    assert [row["image"] for row in rows] == [server.contents[i] for i in expected]


def test_a_snapshot_that_changes_between_head_and_body_is_named(plain):
    plain.fail("/bucket/snapshots", "etag", after=1)
    with pytest.raises(DataError, match="ISIC_metadata.parquet changed while it was read"):
        find_source("isic-archive:").parts()


def test_truncated_and_missing_images_are_counted_and_the_others_sound(server, caplog):
    server.fail("/bucket/thumbnails/ISIC_0000003", "truncated")
    server.fail("/bucket/thumbnails/ISIC_0000060", "404")
    stream = find_source("isic-archive:").stream()
    processor = IsicVQImageProcessor(size=16)
    sound = [
        name
        for batch in iter_batches(stream, processor, 32, max_corrupt_share=0.02)
        for name in batch["isic_ids"]
    ]
    assert sound == [name for name in ids(wanted(server)) if name not in ("ISIC_0000003", "ISIC_0000060")]
    assert re.search(
        r"ISIC_0000060 has no image: .*ISIC_0000060_thumbnail.jpg: the server answered 404", caplog.text
    )
    assert "ISIC_0000003" in caplog.text
    server.fail("/bucket/thumbnails/ISIC_000000", "404", times=5)
    with pytest.raises(DataError, match="images are corrupt, more than the allowed share of 0.02"):
        list(iter_batches(stream, processor, 32, max_corrupt_share=0.02))


def test_rows_carry_labels_licence_and_attribution(plain):
    rows = {row["isic_id"]: row for row in find_source("isic-archive:").metadata()}
    for number in wanted(plain):
        row, about = rows[f"ISIC_{number:07d}"], plain.rows[number]
        assert row["diagnosis"] == DIAGNOSES[number % len(DIAGNOSES)][3]
        assert row["site"] == SITES[number % 4][1]
        assert (row["license"], row["attribution"]) == (about["copyright_license"], about["attribution"])
        for ours, theirs in (("age", "age_approx"), ("sex", "sex"), ("lesion_id",) * 2, ("patient_id",) * 2):
            assert row[ours] == about[theirs]
        assert row["source"] == "isic-archive"


@pytest.mark.parametrize(
    ("filters", "let_pass"),
    [
        ("license=CC-0", lambda row: row["copyright_license"] == "CC-0"),
        ("license=cc0,cc-by", lambda row: row["copyright_license"] in ("CC-0", "CC-BY")),
        ("image_type=dermoscopic", lambda row: row["image_type"] == "dermoscopic"),
        ("image_type=clinical: close-up", lambda row: row["image_type"] == "clinical: close-up"),
        ("diagnosis=mel,bcc", lambda row: row["diagnosis_3"] in ("Melanoma in situ", "Basal cell carcinoma")),
        ("diagnosis=unknown", lambda row: row["diagnosis_3"] in ("Scabies", None)),
        (
            "license=CC-0&image_type=dermoscopic&diagnosis=nevus",
            lambda row: (
                row["copyright_license"] == "CC-0"
                and row["image_type"] == "dermoscopic"
                and row["diagnosis_3"] == "Nevus"
            ),
        ),
        ("collection=78", lambda row: int(row["isic_id"][5:]) % 5 == 0),
        (
            "collection=77,78",
            lambda row: int(row["isic_id"][5:]) % 5 == 0 or int(row["isic_id"][5:]) % 3 == 0,
        ),
        ("query=sex:male", lambda row: row["sex"] == "male"),
        (
            'query=diagnosis_3:"Nevus" AND -sex:male&license=CC-BY',
            lambda row: (
                row["diagnosis_3"] == "Nevus" and row["sex"] != "male" and row["copyright_license"] == "CC-BY"
            ),
        ),
        ("limit=7", lambda row: int(row["isic_id"][5:]) < 7),
    ],
)
def test_filters(filters, let_pass, plain):
    source = find_source(f"isic-archive:{filters}")
    assert [row["isic_id"] for row in source.metadata()] == ids(wanted(plain, let_pass))
    assert find_source(source.name) == source, "the name is a URI of the same images"


@pytest.mark.parametrize("filters", ["", "collection=77", "query=-sex:nobody"])
def test_synthetic_images_never_pass(filters, plain, caplog):
    caplog.set_level(logging.INFO)
    found = [int(row["isic_id"][5:]) for row in find_source(f"isic-archive:{filters}").metadata()]
    assert found
    assert not any(map(is_synthetic, found))
    seen = range(0, NUMBER, 3) if "77" in filters else range(NUMBER)
    number = sum(map(is_synthetic, seen))
    assert f"{len(found)} of {len(seen)} images pass; {number} are left out as synthetic" in caplog.text
    assert number


def test_pages_follow_the_cursor_and_stay_on_the_configured_server(monkeypatch):
    with ArchiveServer(250) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        found = list(find_source("isic-archive:query=-sex:nobody").metadata())
    assert [row["isic_id"] for row in found] == ids(wanted(server))
    pages = server.requests("/api")
    assert [r.query.get("cursor") for r in pages] == [None, ["100"], ["200"]]
    assert pages[0].query["limit"] == ["100"]


def test_no_page_is_asked_for_beyond_the_limit(plain):
    found = list(find_source("isic-archive:query=-sex:nobody&limit=90").metadata())
    assert [row["isic_id"] for row in found] == ids(wanted(plain)[:90])
    assert len(plain.requests("/api")) == 1, "the first 100 images hold 90 that are not synthetic"


def test_an_archive_that_changes_between_pages_lists_an_image_once(plain, caplog):
    plain.shift = 5
    found = [row["isic_id"] for row in find_source("isic-archive:query=-sex:nobody").metadata()]
    assert found == ids(wanted(plain))
    assert "the archive listed 5 images twice; each is read once" in caplog.text


def test_images_that_were_lost_between_pages_are_missed(plain, caplog):
    plain.shift = -5
    list(find_source("isic-archive:query=-sex:nobody").metadata())
    assert "the archive counted 150 images and listed 145: it changed meanwhile" in caplog.text


def test_the_snapshot_has_a_time_and_the_search_has_none(plain):
    info = find_source("isic-archive:license=CC-0").describe()
    assert info.snapshot == SNAPSHOT_TIME
    assert info.name == "isic-archive:license=CC-0"
    assert info.licenses == {"CC-0": len(wanted(plain, lambda row: row["copyright_license"] == "CC-0"))}
    assert find_source("isic-archive:collection=77").describe().snapshot is None


def test_full_images_and_thumbnails_differ_in_bytes_and_fingerprint(plain):
    thumbnail, full = (find_source(f"isic-archive:limit=2&images={kind}") for kind in ("thumbnail", "full"))
    assert [row["image"] for row in rows_of(full.stream())] == [c + b"full" for c in plain.contents[:2]]
    assert [row["image"] for row in rows_of(thumbnail.stream())] == plain.contents[:2]
    assert full.fingerprint() != thumbnail.fingerprint()


def test_the_contract_of_sources(plain):
    source = find_source("isic-archive:")
    assert len(source.parts()) == -(-len(wanted(plain)) // IMAGES_PER_PART)
    for holds in (
        assert_processes_share_the_rows,
        assert_pickled_source_reads_the_same,
        assert_metadata_are_the_rows_without_images,
        assert_stream_resumes_exactly,
    ):
        holds(source)


def test_processes_fetch_no_image_twice_between_them(plain):
    source = find_source("isic-archive:")
    source.parts()
    plain.log.clear()
    for rank in range(3):
        list(source.stream(rank, 3)) if source.parts()[rank::3] else None
    asked = [r.path for r in plain.requests("/bucket/thumbnails")]
    assert len(asked) == len(set(asked)) == len(wanted(plain))
    assert plain.most_connections <= 8


def test_it_can_only_be_streamed(plain):
    with pytest.raises(DataError, match="isic-archive: can only be read as a stream.*isic-vq data prepare"):
        find_source("isic-archive:").dataset()


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ("licence=CC-0", "no filter 'licence'. Expected license, image_type, diagnosis"),
        ("license=MIT", "license=MIT: the archive's licences are CC-0, CC-BY, CC-BY-NC"),
        ("diagnosis=wart", "diagnosis: 'wart' is not a known diagnosis"),
        ("collection=HAM", "collection=HAM: expected numbers, such as 212"),
        ("images=large", "images=large: expected thumbnail or full"),
        ("limit=0", "limit=0: expected a positive number"),
        ("limit=many", "limit=many: expected a positive number"),
        ("CC-0", "is not KEY=VALUE&KEY=VALUE"),
    ],
)
def test_filters_that_are_none(filters, message):
    with pytest.raises(DataError, match=message):
        find_source(f"isic-archive:{filters}")


def test_what_lets_nothing_pass_is_an_error(plain):
    with pytest.raises(
        DataError, match="isic-archive:image_type=RCM lets no image of 150 pass: loosen the filters"
    ):
        find_source("isic-archive:image_type=RCM").parts()


def test_a_bad_query_gives_the_archive_s_answer(plain):
    with pytest.raises(DataError, match=r"answered 400 .*Could not parse search query"):
        find_source("isic-archive:query=benign_malignant:benign").parts()


def test_ids_that_are_no_ids_never_reach_an_address(plain):
    plain.rows[5]["isic_id"] = "../../etc/passwd"
    with pytest.raises(DataError, match="names an image '../../etc/passwd': expected ISIC_ and seven digits"):
        find_source("isic-archive:collection=78").parts()
    assert not plain.requests("/bucket")


@pytest.mark.parametrize("column", ["isic_id", "copyright_license", "image_manipulation"])
def test_a_snapshot_of_another_layout_is_refused(column, plain):
    path = "/bucket/snapshots/ISIC_metadata.parquet"
    table = pyarrow.parquet.read_table(io.BytesIO(plain.files[path])).drop_columns([column])
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    plain.files[path] = sink.getvalue()
    with pytest.raises(DataError, match=f"has no column {column}: its layout has changed"):
        find_source("isic-archive:").parts()
    plain.files[path] = b"no table"
    with pytest.raises(DataError, match="ISIC_metadata.parquet is not a parquet file"):
        find_source("isic-archive:").parts()


def test_a_cache_saves_the_second_epoch(plain, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("ISIC_VQ_CACHE", str(tmp_path))
    caplog.set_level(logging.WARNING)
    first = rows_of(find_source("isic-archive:").stream())
    plain.log.clear()
    assert rows_of(find_source("isic-archive:").stream()) == first
    assert not plain.requests("/bucket/thumbnails")


def test_names_leave_out_what_is_default():
    assert str(ArchiveFilters.parse("")) == ""
    assert str(ArchiveFilters.parse("limit=5&license=cc0&images=thumbnail")) == "license=CC-0&limit=5"
