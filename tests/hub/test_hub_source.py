"""Images of Hub repositories: each row once with its exact bytes, over one commit, whatever the connection does."""

import io
import json
import logging
import random
import re
import subprocess
import sys

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from fake_hub import MAIN, Blob, Fault
from huggingface_hub import HfFileSystem

from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source
from isic_vq.data.sources import hub as hub_module
from isic_vq.data.synthetic_images import synthetic_record
from source_contract import CONTRACT, rows_of

FED = "flwrlabs/fed-isic2019"
WORDS = ["melanoma", "nevus", "basal_cell_carcinoma", "actinic_keratosis", "benign_keratosis"]
WORDS += ["dermatofibroma", "vascular_lesion", "squamous_cell_carcinoma"]
FIRST_FILE = "data/train-00000-of-00002.parquet"


@pytest.fixture
def online(online_hub, monkeypatch):
    """The Hub, for `datasets` in this process, too."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", online_hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    HfFileSystem.clear_instance_cache()
    yield online_hub
    HfFileSystem.clear_instance_cache()


def _png(index):
    return synthetic_record(index, 0)["image"]["bytes"]


def _parquet(columns, features, rows_per_group=3):
    buffer = io.BytesIO()
    Dataset.from_dict(columns, features=features).to_parquet(buffer, batch_size=rows_per_group)
    return buffer.getvalue()


def _fed(first, last, label=None, path=None):
    """Rows of a repository like fed-isic2019."""
    rows = range(first, last)
    images = [{"bytes": _png(row), "path": path and path(row)} for row in rows]
    columns = {"image": images, "center": [row % 6 for row in rows], "label": [row % 8 for row in rows]}
    features = {"image": Image(), "center": Value("int64"), "label": label or Value("int64")}
    return _parquet(columns, Features(features))


def _serve(hub, repo, files, **access):
    """Make a data set repository; a file of more than a few bytes is a large one."""
    repository = hub.create(f"datasets/{repo}", **access)
    blobs = {path: Blob(content, large=len(content) > 2000) for path, content in files.items()}
    return repository.commit(MAIN, blobs, "files")


@pytest.fixture
def fed(online):
    files = {FIRST_FILE: _fed(0, 8), "data/train-00001-of-00002.parquet": _fed(8, 12)}
    files["data/test-00000-of-00001.parquet"] = _fed(12, 14)
    _serve(online, FED, files)
    online.log.clear()
    return online


def _ranges(hub):
    """Bytes of the ranges that were asked for, in order."""
    asked = [re.fullmatch(r"bytes=(\d+)-(\d+)", entry.headers.get("range", "")) for entry in hub.log]
    return [(int(match[1]), int(match[2])) for match in asked if match]


@pytest.mark.parametrize("holds", CONTRACT)
def test_parquet_on_the_hub_keeps_the_contract(holds, fed):
    source = find_source(f"hub:{FED}")
    assert len(source.parts()) == 5  # groups of 3, 3, 2 and 3, 1 rows
    holds(source)


def test_rows_of_a_known_set_come_value_by_value(fed):
    rows = rows_of(find_source(f"hub:{FED}").stream())
    for index, row in enumerate(rows):
        attribution = row.pop("attribution")
        assert "BCN_20000 (c) Department of Dermatology" in attribution
        assert "HAM10000 (c) ViDIR Group" in attribution
        assert row == {
            "image": _png(index),
            "isic_id": f"fed-isic2019-train-{index:06d}",
            "lesion_id": None,
            "patient_id": None,
            "diagnosis": WORDS[index % 8],
            "age": None,
            "sex": None,
            "site": None,
            "source": f"fed-isic2019 center {index % 6}",
            "license": "CC-BY-NC-4.0",
        }
    assert len(rows) == 12
    assert len(list(find_source(f"hub:{FED}?split=test").metadata())) == 2


def test_class_names_of_the_repository_win_over_the_table(online):
    """Ids are those of the column, -1 is a missing class, and a name beside the bytes is the id."""
    label = ClassLabel(names=["NV", "MEL", "BCC", "AK", "BKL", "DF", "VASC", "SCC"])
    columns = {
        "image": [{"bytes": _png(0), "path": "ISIC_0000007.jpg"}] * 2,
        "center": [0, 0],
        "label": [0, -1],
    }
    features = Features({"image": Image(), "center": Value("int64"), "label": label})
    _serve(online, FED, {"train.parquet": _parquet(columns, features)})
    rows = list(find_source(f"hub:{FED}").metadata())
    assert [(row["isic_id"], row["diagnosis"]) for row in rows] == [
        ("ISIC_0000007", "nevus"),
        ("ISIC_0000007", "unknown"),
    ]


def test_ham10000_of_the_hub_keeps_its_groups_and_warns_of_its_splits(online, caplog):
    columns = {
        "image": [_png(0), _png(1)],
        "image_id": ["ISIC_0024306", "ISIC_0024307"],
        "lesion_id": ["HAM_1", "HAM_2"],
        "dx": ["melanocytic_Nevi", "melanoma"],
        "dx_type": ["histo", "follow_up"],
        "age": [50.0, None],
        "sex": ["male", "unknown"],
        "localization": ["trunk", "unknown"],
    }
    kinds = {"image": Value("binary"), "age": Value("float64")}
    features = Features({name: kinds.get(name, Value("string")) for name in columns})
    _serve(online, "marmal88/skin_cancer", {"data/train-0.parquet": _parquet(columns, features)})
    with caplog.at_level(logging.WARNING):
        source = find_source("hub:marmal88/skin_cancer")
    assert "splits repeat images and share lesions" in caplog.text
    assert "isic-vq data prepare" in caplog.text
    first, second = rows_of(source.stream())
    assert (first["isic_id"], first["lesion_id"], first["diagnosis"]) == ("ISIC_0024306", "HAM_1", "nevus")
    assert (first["age"], first["sex"], first["image"]) == (50.0, "male", _png(0))
    assert (second["diagnosis"], second["age"], second["sex"], second["site"]) == (
        "melanoma",
        None,
        None,
        None,
    )
    assert source.describe().licenses == {"unknown": 2}
    assert all("doi 10.1038/sdata.2018.161" in line for line in source.describe().attributions)


def test_query_maps_columns_and_sets_values(online):
    columns = {
        "picture": [_png(0), _png(1)],
        "id": ["a", "b"],
        "kind": [1, None],
        "dx": ["not", "these"],
        "years": ["30", "unknown"],
        "where": ["x", "y"],
    }
    kinds = {"picture": Value("binary"), "kind": Value("int32")}
    features = Features({name: kinds.get(name, Value("string")) for name in columns})
    _serve(online, "someone/moles", {"data/dev-0.parquet": _parquet(columns, features)})
    uri = (
        "hub:someone/moles@main?split=validation&image=picture&isic_id=id&diagnosis=kind&classes=NV,MEL&age=years"
        "&set.license=CC-BY-4.0&set.attribution=A%20%26%20B&set.source=clinic+{where}"
    )
    rows = rows_of(find_source(uri).stream())
    common = {"license": "CC-BY-4.0", "attribution": "A & B", "sex": None, "site": None}
    common |= {"lesion_id": None, "patient_id": None}
    assert rows == [
        {
            **common,
            "image": _png(0),
            "isic_id": "a",
            "diagnosis": "melanoma",
            "age": 30.0,
            "source": "clinic x",
        },
        {
            **common,
            "image": _png(1),
            "isic_id": "b",
            "diagnosis": "unknown",
            "age": None,
            "source": "clinic y",
        },
    ]


def test_what_the_user_says_wins_over_the_table(fed):
    source = find_source(f"hub:{FED}?set.license=CC0-1.0&source=center")
    assert {row["license"] for row in source.metadata()} == {"CC0-1.0"}
    assert [row["source"] for row in source.metadata()] == [str(index % 6) for index in range(12)]


def test_metadata_leave_the_images_where_they_are(fed):
    source = find_source(f"hub:{FED}")
    parts = source.parts()
    footer = hub_module._footer(parts[0][0])
    fed.log.clear()
    assert len(list(source.metadata())) == 12
    asked = _ranges(fed)
    assert len(asked) == len(parts), "one request per row group"
    images = []
    for group in range(footer.num_row_groups):
        column = footer.row_group(group).column(0)
        assert column.path_in_schema == "image.bytes"
        start = column.dictionary_page_offset or column.data_page_offset
        images.append(range(start, start + column.total_compressed_size))
    for first, last in asked[: footer.num_row_groups]:
        assert not any(first < image.stop and image.start <= last for image in images)
    assert sum(last - first + 1 for first, last in asked) < 0.1 * sum(len(image) for image in images)


def test_row_group_is_read_by_one_request(fed):
    source = find_source(f"hub:{FED}")
    parts = source.parts()
    fed.log.clear()
    assert len(list(source.read(parts[1]))) == 3
    assert len(_ranges(fed)) == 1


def test_source_stays_with_its_commit(fed):
    repository = fed.repos[f"datasets/{FED}"]
    old, first = repository.resolve("main"), find_source(f"hub:{FED}")
    repository.commit(MAIN, {FIRST_FILE: Blob(_fed(30, 32), large=True)}, "other images")
    second = find_source(f"hub:{FED}")
    assert [row["image"] for row in rows_of(first.stream())] == [_png(index) for index in range(12)]
    assert [row["image"] for row in rows_of(second.stream())] == [_png(30), _png(31)]
    assert first.fingerprint() != second.fingerprint()
    pinned = find_source(f"hub:{FED}@{old}")
    assert pinned.fingerprint() == first.fingerprint()
    assert pinned.describe().snapshot == f"commit {old}"


def test_fingerprint_follows_the_split_and_the_columns(fed):
    uris = ("", "?split=test", "?set.license=CC0-1.0", "?diagnosis=center")
    assert len({find_source(f"hub:{FED}{query}").fingerprint() for query in uris}) == 4
    assert find_source(f"hub:{FED}?split=train").fingerprint() == find_source(f"hub:{FED}").fingerprint()


FAULTS = {
    "limited": {"times": 2, "status": 429, "headers": {"Retry-After": "1"}},
    "unavailable": {"times": 2, "status": 503},
    "cut": {"times": 2, "after_bytes": 1000},
    "cut for longer than the Hub's client tries": {"times": 8, "after_bytes": 1000},
}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("moment", ["opening", "between rows", "metadata"])
def test_every_row_comes_once_whatever_the_connection_does(kind, moment, fed, waits):
    fault = Fault(r"/resolve/.*parquet", "GET", **FAULTS[kind])
    if moment == "opening":
        fed.faults.append(fault)
    source = find_source(f"hub:{FED}")
    rows = []
    if moment == "metadata":
        fed.faults.append(fault)
        assert [row["source"][-1] for row in source.metadata()] == [str(index % 6) for index in range(12)]
    else:
        stream = iter(source.stream().cast_column("image", Image(decode=False)))
        rows.append(next(stream))
        fed.faults += [fault] if moment == "between rows" else []
        rows += list(stream)
        assert [row["image"]["bytes"] for row in rows] == [_png(index) for index in range(12)]
    assert fault.times == 0
    assert waits


def test_broken_part_goes_on_after_the_last_row_that_came(online, waits, monkeypatch):
    monkeypatch.setattr(hub_module, "READ_SIZE", 1 << 18)
    images = [random.Random(row).randbytes(30_000) for row in range(100)]  # several pages, none like another
    columns = {"image": images, "isic_id": [f"row {row}" for row in range(100)]}
    features = Features({"image": Value("binary"), "isic_id": Value("string")})
    _serve(online, "a/b", {"train.parquet": _parquet(columns, features, rows_per_group=100)})
    source = find_source("hub:a/b")
    (part,) = source.parts()
    rows = source.read(part)
    seen = [next(rows)]
    fault = Fault(r"/resolve/.*parquet", "GET", times=8, after_bytes=1000)
    online.faults.append(fault)
    seen += rows
    assert fault.times == 0
    assert [row["isic_id"] for row in seen] == [f"row {row}" for row in range(100)]
    assert [row["image"] for row in seen] == images


@pytest.mark.parametrize("status", [429, 500, 503])
def test_questions_before_the_first_row_are_repeated_too(status, fed, waits):
    faults = [
        Fault(path, "GET", times=2, status=status) for path in (r"/api/datasets/[^/]+/[^/]+$", "/tree/")
    ]
    fed.faults += faults
    assert len(list(find_source(f"hub:{FED}").metadata())) == 12
    assert [fault.times for fault in faults] == [0, 0]


def test_connection_that_stays_broken_is_one_error(fed, waits):
    source = find_source(f"hub:{FED}")
    source.parts()
    fed.faults.append(Fault(r"/resolve/.*parquet", "GET", times=1000, status=503))
    with pytest.raises(
        DataError, match=f"hub:{FED}: the Hub is in trouble .status 503. .* run this again later"
    ):
        list(source.stream())
    assert len(_ranges(fed)) < 60


def test_other_formats_are_read_from_the_copy_that_the_hub_keeps(online, caplog):
    sha = _serve(online, "someone/folder", {"train/NV/a.png": _png(0), "train/MEL/b.png": _png(1)})
    with pytest.raises(
        DataError, match=r"not hold parquet files.* hub:someone/folder@refs/convert/parquet; or"
    ):
        find_source("hub:someone/folder")
    repository = online.repos["datasets/someone/folder"]
    copy = {
        "a/train/0000.parquet": _fed(0, 4),
        "a/train/0001.parquet": _fed(4, 6),
        "b/test/0000.parquet": _fed(6, 7),
    }
    copy |= {"b/partial-train/0000.parquet": _fed(7, 9)}
    files = {path: Blob(content, large=True) for path, content in copy.items()}
    repository.commit("refs/convert/parquet", files, "copy")
    uri = "hub:someone/folder@refs/convert/parquet?set.diagnosis=unknown&"
    source = find_source(f"{uri}config=a")
    assert source.commit != sha
    assert [row["image"] for row in rows_of(source.stream())] == [_png(index) for index in range(6)]
    assert "converted only a part" not in caplog.text
    assert len(list(find_source(f"{uri}config=b&split=test").metadata())) == 1
    assert len(list(find_source(f"{uri}config=b").metadata())) == 2
    assert "the Hub has converted only a part of train" in caplog.text
    with pytest.raises(DataError, match="has the configurations a, b. Name one by config=NAME"):
        find_source(uri)
    with pytest.raises(DataError, match="has no split 'test', only train"):
        find_source(f"{uri}config=a&split=test")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "fed-isic2019",
            r"is not hub:OWNER/NAME\[@REVISION\]\[\?KEY=VALUE&...\]",
        ),
        ("a/b/c", "is not hub:OWNER/NAME"),
        (
            "no/such",
            "datasets/no/such does not exist or is private: correct the name, or log in with `hf auth",
        ),
        ("user/private", "datasets/user/private does not exist or is private: correct the name, or log in"),
        ("user/gated", "datasets/user/gated is gated: ask for access|gated dataset"),
        ("user/empty", "holds no|No .supported. data files found|no data|doesn't contain any data"),
        (f"{FED}@v9", f"datasets/{FED} has no revision v9: expected a branch, tag or commit"),
        (f"{FED}?split=dev", "has no split 'dev', only train, test: name one by split=NAME"),
        (
            f"{FED}?config=b",
            r"BuilderConfig 'b' not found. Available: \['default'\] Name a configuration by config=",
        ),
        (f"{FED}?image=x&sex=y", "has no column x, y, only image, center, label. Name it by image=COLUMN"),
        (
            f"{FED}?image=label",
            r"the column label holds .*int64.*, expected images or their bytes. Name another",
        ),
        (f"{FED}?set.source={{clinic}}", "has no column clinic, only image, center, label"),
        (
            f"{FED}?splits=x",
            "has the unknown key 'splits'. Expected split=, config=, classes=, image=, isic_id=",
        ),
        (f"{FED}?set.image=x", "has the unknown key 'set.image'"),
        (f"{FED}?sex=", "has no value for sex"),
        (f"{FED}?sex=label&sex=center", "names sex twice"),
        (f"{FED}?sex=label&set.sex=male", "names sex twice"),
    ],
)
def test_what_the_hub_does_not_have_tells_the_way_out(target, message, fed, waits):
    _serve(fed, "user/private", {"train.parquet": _fed(0, 1)}, private=True)
    _serve(fed, "user/gated", {"README.md": b"", "train.parquet": _fed(0, 1)}, gated=True)
    words = {"image": [_png(0)], "dx": ["nv"]}
    features = Features({"image": Image(), "dx": Value("string")})
    _serve(fed, "a/words", {"train.parquet": _parquet(words, features)})
    _serve(fed, "user/empty", {"README.md": b"# Nothing"})
    with pytest.raises(DataError, match=message) as error:
        find_source(f"hub:{target}")
    assert "\n" not in str(error.value)


def test_token_opens_a_private_set_and_is_told_to_nobody(fed, monkeypatch, caplog):
    _serve(fed, "user/private", {"train.parquet": _fed(0, 2)}, private=True)
    monkeypatch.setenv("HF_TOKEN", "hf_fake_admin")
    HfFileSystem.clear_instance_cache()
    source = find_source("hub:user/private?diagnosis=label&classes=MEL,NV")
    assert [row["image"] for row in rows_of(source.stream())] == [_png(0), _png(1)]
    assert "hf_fake_admin" not in repr(source) + caplog.text + json.dumps(vars(source.describe()))


def test_class_number_out_of_range_names_the_row(fed):
    source = find_source(f"hub:{FED}?classes=MEL,NV")
    with pytest.raises(
        DataError, match=r"fed-isic2019, split train, row 2: label is 2, expected 0 to 1 for MEL, NV"
    ):
        list(source.metadata())


def test_file_that_lacks_a_column_is_named(online):
    one = _parquet({"image": [_png(0)], "dx": ["nv"]}, Features({"image": Image(), "dx": Value("string")}))
    two = _parquet({"image": [_png(1)]}, Features({"image": Image()}))
    _serve(online, "a/b", {"data/train-0.parquet": one, "data/train-1.parquet": two})
    with pytest.raises(DataError, match="train-1.parquet lacks the column dx of the split's first file"):
        find_source("hub:a/b?diagnosis=dx").parts()


def test_process_that_leaves_a_stream_early_ends(fed, hub_env):
    code = (
        "from isic_vq.data.sources import find_source\n"
        f"source = find_source('hub:{FED}')\n"
        "print(next(iter(source.stream()))['source'], next(iter(source.metadata()))['license'])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, env=hub_env, text=True
    )
    assert ended.stdout == "fed-isic2019 center 0 CC-BY-NC-4.0\n"


@pytest.mark.real_data
def test_real_images_arrive_as_they_lie_here(online, data_dir):
    shards = sorted((data_dir / "ham10000").glob("validation-*.parquet"))
    _serve(online, "user/ham", {f"data/{shard.name}": shard.read_bytes() for shard in shards})
    there, here = (
        find_source("hub:user/ham?split=validation"),
        find_source("parquet:${ISIC_VQ_DATA}/ham10000/val*"),
    )
    assert rows_of(there.stream()) == rows_of(here.stream())
    online.log.clear()
    assert list(there.metadata()) == list(here.metadata())
    asked = sum(last - first + 1 for first, last in _ranges(online))
    assert asked < 0.02 * sum(shard.stat().st_size for shard in shards)


@pytest.mark.parametrize("kind", ["strings", "class ids", "integers"])
def test_own_classes_are_declared_in_the_uri_or_stop(kind, online):
    feature = {
        "strings": Value("string"),
        "class ids": ClassLabel(names=["eczema", "psoriasis"]),
        "integers": Value("int64"),
    }
    labels = ["psoriasis", "eczema", "psoriasis"] if kind == "strings" else [1, 0, 1]
    columns = {"image": [_png(row) for row in range(3)], "label": labels}
    _serve(
        online,
        "a/own",
        {"data/train.parquet": _parquet(columns, Features({"image": Image(), "label": feature[kind]}))},
    )
    for read in (lambda source: source.describe(), lambda source: source.dataset()):
        with pytest.raises(DataError, match=r"\(2 images\), '(eczema|0)' \(1 image\) are no known classes"):
            read(find_source("hub:a/own"))
    for source in (
        find_source("hub:a/own?classes=eczema,psoriasis"),
        *([] if kind == "integers" else [find_source("hub:a/own?classes=auto")]),
    ):
        info = source.describe()
        assert (info.diagnoses, info.classes) == ({"eczema": 1, "psoriasis": 2}, ["eczema", "psoriasis"])
        assert source.dataset()["diagnosis"][:] == ["psoriasis", "eczema", "psoriasis"]
