"""Challenge archives as a source: one zip archive over HTTP or on disk, joined with its tables."""

import logging
import re
import zipfile

import pytest
from archive_server import WORDS_2020, ArchiveServer, challenge_files, images, one_hot_csv, zipped
from fault_server import FaultServer

from isic_vq.data.loading import iter_batches
from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source
from isic_vq.data.sources.challenge import RELEASES, RangeZip, _open
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from source_contract import (
    assert_metadata_are_the_rows_without_images,
    assert_pickled_source_reads_the_same,
    assert_processes_share_the_rows,
    assert_stream_resumes_exactly,
    rows_of,
)

NUMBER = 26
REAL = pytest.param(True, marks=pytest.mark.real_data)
HAM = ["melanoma", "nevus", "basal_cell_carcinoma", "actinic_keratosis", "benign_keratosis", "dermatofibroma"]
EXPECTED = {
    "2016": ["melanoma", "unknown", "unknown"],
    "2017": ["melanoma", "benign_keratosis", "nevus"],
    "2018": [*HAM, "vascular_lesion"],
    "2019": [*HAM, "vascular_lesion", "squamous_cell_carcinoma", "unknown"],
    "2020": [
        "nevus",
        "melanoma",
        "benign_keratosis",
        "unknown",
        "benign_keratosis",
        "benign_keratosis",
        *["unknown"] * 3,
    ],
}


@pytest.fixture(autouse=True)
def _opened_anew():
    _open.cache_clear()


@pytest.fixture
def server(monkeypatch):
    with FaultServer() as server:
        for name, value in ArchiveServer.environment(server).items():
            monkeypatch.setenv(name, value)
        yield server


def serve(server, year, contents, method=zipfile.ZIP_STORED):
    files, names = challenge_files(year, contents, method)
    server.files |= {f"/challenge/{path}": content for path, content in files.items()}
    return names


def images_zip(year):
    return f"/challenge/{RELEASES[year, 'train'].images}"


@pytest.mark.parametrize("real", [False, REAL])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("year", sorted(EXPECTED))
def test_images_and_labels_of_every_year(year, method, real, server, request):
    if real:
        request.getfixturevalue("data_dir")
    contents = images(NUMBER, real)
    names = serve(server, year, contents, method)
    rows = rows_of(find_source(f"challenge:{year}").stream())
    assert [row["isic_id"] for row in rows] == names
    assert [row["image"] for row in rows] == contents
    cycle = EXPECTED[year]
    assert [row["diagnosis"] for row in rows] == [cycle[i % len(cycle)] for i in range(NUMBER)]
    licence = "CC-0" if year in ("2016", "2017") else "CC-BY-NC"
    assert {(row["license"], row["source"]) for row in rows} == {(licence, f"isic-challenge-{year}")}
    assert all(row["attribution"] for row in rows)


def test_what_the_tables_say_beside_the_diagnosis(server):
    for year in ("2018", "2019", "2020"):
        serve(server, year, images(NUMBER))
    rows = {year: list(find_source(f"challenge:{year}").metadata()) for year in ("2018", "2019", "2020")}
    assert [row["lesion_id"] for row in rows["2018"]] == [f"HAM_{i // 2:07d}" for i in range(NUMBER)]
    for i, row in enumerate(rows["2019"]):
        assert row["age"] == (5.0 * i if i % 4 else None)
        assert row["site"] == ("anterior torso" if i % 2 else None)
        assert row["lesion_id"] == (None if i % 3 else f"BCN_{i}")
        assert row["sex"] == ("male" if i % 2 else None)
    for i, row in enumerate(rows["2020"]):
        assert (row["patient_id"], row["lesion_id"]) == (f"IP_{i // 3:07d}", f"IL_{i:07d}")
        assert (row["age"], row["site"], row["sex"]) == (45.0, "torso", "female" if i % 2 else "male")
    assert len(WORDS_2020) == 9


@pytest.mark.parametrize("kind", ["429", "503", "cut", "reset", "slow", "stall"])
def test_every_image_comes_once_whatever_fails(kind, server, monkeypatch):
    server.stall_seconds = 1.0
    if kind == "stall":
        monkeypatch.setenv("ISIC_VQ_READ_TIMEOUT", "0.5")
    contents = images(NUMBER)
    names = serve(server, "2018", contents)
    for path in server.files:
        server.fail(path, kind)
    server.fail(images_zip("2018"), kind, times=2, after=2)
    rows = rows_of(find_source("challenge:2018").stream())
    assert [(row["isic_id"], row["image"]) for row in rows] == list(zip(names, contents, strict=True))


def test_a_zip_that_changes_while_it_is_read_is_never_a_mixture(server, caplog):
    serve(server, "2018", images(NUMBER))
    source = find_source("challenge:2018")
    source.parts()
    server.fail(images_zip("2018"), "etag")
    rows = rows_of(source.stream())
    assert [row["image"] for row in rows] == [None] * NUMBER
    assert "changed while it was read. Start again" in caplog.text


def test_a_truncated_and_a_damaged_image_are_counted_and_the_others_sound(server, caplog):
    contents = images(NUMBER)
    contents[4] = contents[4][: len(contents[4]) // 2]  # truncated before it was packed
    names = serve(server, "2018", contents)
    path = images_zip("2018")
    at = server.files[path].index(contents[9])
    server.files[path] = server.files[path][: at + 50] + b"\0\0" + server.files[path][at + 52 :]
    stream = find_source("challenge:2018").stream()
    batches = iter_batches(stream, IsicVQImageProcessor(size=16), 8, max_corrupt_share=0.1)
    assert [n for batch in batches for n in batch["isic_ids"]] == [
        n for i, n in enumerate(names) if i not in (4, 9)
    ]
    assert (
        f"{names[9]} has no image: {names[9]}.jpg cannot be read from the zip archive (Bad CRC-32"
        in caplog.text
    )


def test_a_member_that_was_damaged_on_the_way_is_fetched_again(server, monkeypatch):
    contents = images(NUMBER)
    serve(server, "2018", contents)
    path, sound = images_zip("2018"), server.files[images_zip("2018")]
    source = find_source("challenge:2018")
    source.parts()
    fetch, broken = RangeZip._fetch, []

    def once_broken(archive, ranges):
        for packed in fetch(archive, ranges):
            if not broken:
                broken.append(packed.index(contents[3]))
                packed = packed[: broken[0]] + b"\0\0" + packed[broken[0] + 2 :]
            yield packed

    monkeypatch.setattr(RangeZip, "_fetch", once_broken)
    assert [row["image"] for row in rows_of(source.stream())] == contents
    assert broken
    assert server.files[path] == sound


def test_few_requests_read_many_images(server):
    contents = images(20) * 30
    serve(server, "2018", contents)
    source = find_source("challenge:2018")
    assert len(rows_of(source.stream())) == 600
    assert len(source.parts()) >= 600 // 64
    asked = server.requests(images_zip("2018"))
    assert len(asked) <= len(source.parts()) + 8
    size = len(server.files[images_zip("2018")])
    assert sum(r.sent for r in asked) < size + (2 << 20), "hardly a byte twice"
    assert _open.cache_info().misses == 1, "the directory and the tables are read once, not for each part"


def test_the_contract_of_sources(server):
    serve(server, "2019", images(20) * 8)
    source = find_source("challenge:2019")
    for holds in (
        assert_processes_share_the_rows,
        assert_pickled_source_reads_the_same,
        assert_metadata_are_the_rows_without_images,
        assert_stream_resumes_exactly,
    ):
        holds(source)


@pytest.mark.parametrize("as_url", [False, True])
def test_a_folder_serves_as_a_server_does(as_url, tmp_path, monkeypatch):
    contents = images(NUMBER)
    files, names = challenge_files("2017", contents)
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    monkeypatch.setenv("ISIC_VQ_CHALLENGE_URL", tmp_path.as_uri() if as_url else str(tmp_path))
    source = find_source("challenge:2017")
    assert [row["image"] for row in rows_of(source.stream())] == contents
    info = source.describe()
    assert (info.name, info.num_images, info.licenses) == ("challenge:2017:train", NUMBER, {"CC-0": NUMBER})
    fingerprint = info.fingerprint
    (tmp_path / "2017" / "ISIC-2017_Training_Part3_GroundTruth.csv").write_text(
        "image_id,melanoma,seborrheic_keratosis\n" + "\n".join(f"{n},0.0,0.0" for n in names)
    )
    _open.cache_clear()
    assert source.fingerprint() != fingerprint, "labels are content"
    assert {row["diagnosis"] for row in source.metadata()} == {"nevus"}


def test_images_without_a_row_are_unknown(server):
    names = serve(server, "2019", images(4))
    table = "/challenge/2019/ISIC_2019_Training_GroundTruth.csv"
    server.files[table] = b"\n".join(server.files[table].splitlines()[:-1])
    rows = list(find_source("challenge:2019").metadata())
    assert [row["isic_id"] for row in rows] == names
    assert rows[-1]["diagnosis"] == "unknown"
    assert rows[0]["diagnosis"] == "melanoma"


def test_rows_and_images_without_each_other_are_counted(server, caplog):
    caplog.set_level(logging.INFO)
    names = serve(server, "2018", images(5))
    server.files["/challenge/2018/ISIC2018_Task3_Training_LesionGroupings.csv"] += (
        b"\nISIC_9999999,HAM_1,histo"
    )
    table = "GT/ISIC2018_Task3_Training_GroundTruth.csv"
    rows = one_hot_csv("2018", names).splitlines()[:-1]
    server.files["/challenge/2018/ISIC2018_Task3_Training_GroundTruth.zip"] = zipped(
        {table: b"\n".join(rows)}
    )
    found = list(find_source("challenge:2018").metadata())
    assert "challenge:2018:train: 5 images; 0 of them are in no table, 1 rows have no image" in caplog.text
    assert found[-1]["diagnosis"] == "unknown", "the lesions' table alone names it"


def test_names_of_2019_that_say_downsampled_are_ids_like_others(server):
    names = [f"ISIC_{number:07d}" for number in range(3)]
    written = [names[0], f"{names[1]}_downsampled", f"{names[2]}_downsampled"]
    stem = "/challenge/2019/ISIC_2019_Training"
    server.files |= {
        f"{stem}_Input.zip": zipped({f"in/{name}.jpg": images(1)[0] for name in written}),
        f"{stem}_GroundTruth.csv": one_hot_csv("2019", written),
        f"{stem}_Metadata.csv": "\n".join(
            ["image,lesion_id", *(f"{name},L{i}" for i, name in enumerate(written))]
        ).encode(),
    }
    rows = list(find_source("challenge:2019").metadata())
    assert [row["isic_id"] for row in rows] == names
    assert [row["diagnosis"] for row in rows] == ["melanoma", "nevus", "basal_cell_carcinoma"]
    assert [row["lesion_id"] for row in rows] == ["L0", "L1", "L2"]


def test_the_test_images_of_2020_have_patients_and_no_diagnosis(server):
    server.files |= {
        "/challenge/2020/ISIC_2020_Test_JPEG.zip": zipped({"t/ISIC_0052060.jpg": images(1)[0]}),
        "/challenge/2020/ISIC_2020_Test_Metadata.csv": (
            b"image,patient,age_approx,anatom_site_general_challenge,sex\nISIC_0052060,IP_3579794,70.0,,male"
        ),
    }
    (row,) = find_source("challenge:2020:test").metadata()
    assert (row["patient_id"], row["age"], row["sex"]) == ("IP_3579794", 70.0, "male")
    assert (row["site"], row["diagnosis"]) == (None, "unknown")


def test_images_to_segment_need_no_table(server):
    contents = images(3)
    members = {f"ISIC2018_Task1-2_Training_Input/ISIC_{i:07d}.jpg": c for i, c in enumerate(contents)}
    members |= {"x/ISIC_0000001_segmentation.png": b"mask", "__MACOSX/x/._ISIC_0000001.jpg": b"fork"}
    members |= {"__MACOSX/x/ISIC_0000001.jpg": b"fork", "x/ATTRIBUTION.txt": b"(c)"}
    server.files["/challenge/2018/ISIC2018_Task1-2_Training_Input.zip"] = zipped(members)
    rows = rows_of(find_source("challenge:2018-task1").stream())
    assert [row["image"] for row in rows] == contents
    assert {(row["diagnosis"], row["license"]) for row in rows} == {("unknown", "CC-0")}


def test_two_diagnoses_in_a_row_are_an_error(server):
    names = serve(server, "2018", images(3))
    rows = f"image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n{names[1]},1.0,1.0,0.0,0.0,0.0,0.0,0.0".encode()
    server.files["/challenge/2018/ISIC2018_Task3_Training_GroundTruth.zip"] = zipped({"truth.csv": rows})
    with pytest.raises(DataError, match=f"{names[1]}.*MEL and NV are both 1, expected one diagnosis"):
        list(find_source("challenge:2018").metadata())


def test_archives_without_images_or_with_one_twice_are_refused(server):
    path, image = "/challenge/2018/ISIC2018_Task1-2_Test_Input.zip", images(1)[0]
    server.files[path] = zipped({"x/photo.jpg": image, "x/ISIC_12.jpg": image})
    with pytest.raises(DataError, match=r"no file in .*Test_Input.zip is named like ISIC_0000000.jpg"):
        find_source("challenge:2018-task1:test").parts()
    server.files[path] = zipped({"a/ISIC_0000001.jpg": image, "b/ISIC_0000001.jpg": image})
    with pytest.raises(DataError, match="1 images have the id of another one"):
        find_source("challenge:2018-task1:test").parts()


def test_releases_in_the_archive_s_bucket_are_found_there(server, monkeypatch):
    monkeypatch.delenv("ISIC_VQ_CHALLENGE_URL")
    files, names = challenge_files("2017", images(3))
    server.files |= {f"/bucket/challenges/{path}": content for path, content in files.items()}
    assert [row["isic_id"] for row in find_source("challenge:2017").metadata()] == names


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("challenge:2015", "'challenge:2015' is not known. Expected YEAR or YEAR:PART, of 2016:train"),
        ("challenge:2020:validation", "is not known.*2020:train, 2020:test"),
        ("challenge:", "names nothing"),
    ],
)
def test_challenges_that_do_not_exist(uri, message):
    with pytest.raises(DataError, match=message):
        find_source(uri)


def test_files_that_are_not_there(server, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="ISIC_2019_Training_Input.zip: the server answered 404"):
        find_source("challenge:2019").parts()
    monkeypatch.setenv("ISIC_VQ_CHALLENGE_URL", str(tmp_path))
    with pytest.raises(DataError, match="ISIC_2019_Training_Input.zip is not there: expected a zip archive"):
        find_source("challenge:2019").parts()


def test_zip_archives_that_cannot_be_read(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(DataError, match="a.zip is not a whole zip archive"):
        RangeZip.open(str(tmp_path / "a.zip"))
    with zipfile.ZipFile(tmp_path / "b.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.jpg", b"content" * 50)
        archive.writestr("b.jpg", b"secret")
        archive.getinfo("b.jpg").flag_bits |= 1  # encrypted
    opened = RangeZip.open(str(tmp_path / "b.zip"))
    (_, sound), (_, encrypted) = opened.read(opened.members)
    assert sound == b"content" * 50
    assert re.search("b.jpg cannot be read from the zip archive .*encrypted", str(encrypted))


def test_a_remote_file_of_a_few_bytes_is_no_zip_archive(server):
    server.files["/tiny.zip"] = b"zip"
    with pytest.raises(DataError, match="/tiny.zip is not a whole zip archive"):
        RangeZip.open(f"{server.url}/tiny.zip")


def test_zip64_and_any_order_of_members(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("c", "a", "b"):
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(name.encode() * 100_000)
    opened = RangeZip.open(str(tmp_path / "a.zip"))
    assert [m.filename for m in opened.members] == ["c", "a", "b"]
    assert {m.filename: content for m, content in opened.read(opened.members)} == {
        name: name.encode() * 100_000 for name in "abc"
    }
