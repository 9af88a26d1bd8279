"""Own classes from every kind of source: what is not declared stops, what folds is told, and nothing else changes."""

import csv
import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from isic_vq.data.classes import ISIC, Classes, Reading, ordered_classes
from isic_vq.data.prepare import Preparation, prepare
from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source
from isic_vq.data.splits import Assignment, assign_splits, split_rows
from isic_vq.data.synthetic_images import synthetic_image

OWN = ("psoriasis", "eczema", "mel", "melanoma")  # labels of the four images of every source


def _png(index):
    buffer = io.BytesIO()
    synthetic_image(index, 0, size=32).save(buffer, format="PNG")
    return buffer.getvalue()


def _folders(path):
    for index, name in enumerate(OWN):
        (path / name).mkdir(parents=True)
        (path / name / f"{index}.png").write_bytes(_png(index))
    return f"folder:{path}"


def _table(path):
    path.mkdir()
    with (path / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file_name", "dx"))
        for index, name in enumerate(OWN):
            (path / f"{index}.png").write_bytes(_png(index))
            writer.writerow((f"{index}.png", name))
    return f"folder:{path}"


def _parquet(path, feature):
    names = list(dict.fromkeys(OWN))
    labels = [names.index(name) for name in OWN] if isinstance(feature, ClassLabel) else list(OWN)
    data = {"image": [_png(index) for index in range(4)], "isic_id": list("0123"), "label": labels}
    features = Features({"image": Value("binary"), "isic_id": Value("string"), "label": feature})
    Dataset.from_dict(data, features=features).to_parquet(path)
    return f"parquet:{path}"


def _tar(path, suffix):
    with tarfile.open(path, "w") as tar:
        for index, name in enumerate(OWN):
            about = name if suffix == "cls" else json.dumps({"diagnosis": name})
            for ending, content in (("png", _png(index)), (suffix, about.encode())):
                member = tarfile.TarInfo(f"{index}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return f"webdataset:{path}"


SOURCES = {
    "folders": lambda path: _folders(path / "set"),
    "table": lambda path: _table(path / "set"),
    "strings": lambda path: _parquet(path / "a.parquet", Value("string")),
    "class ids": lambda path: _parquet(path / "a.parquet", ClassLabel(names=list(dict.fromkeys(OWN)))),
    "cls": lambda path: _tar(path / "a.tar", "cls"),
    "json": lambda path: _tar(path / "a.tar", "json"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_own_classes_of_every_source(kind, tmp_path):
    uri = SOURCES[kind](tmp_path)
    for read in (lambda s: s.describe(), lambda s: s.dataset(), lambda s: list(s.metadata())):
        with pytest.raises(DataError, match=r"'eczema' \(1 image\), 'psoriasis' \(1 image\) are no known"):
            read(find_source(uri))
    declared = find_source(uri, Classes.parse("psoriasis,eczema,melanoma"))
    info = declared.describe()
    assert info.diagnoses == {"eczema": 1, "melanoma": 2, "psoriasis": 1}
    assert info.classes == ["psoriasis", "eczema", "melanoma"]
    assert list(declared.findings.lines()) == ['labels read as another name: "mel" -> melanoma, 1 image']
    for source in (declared, find_source(uri, Classes.parse("auto"))):
        rows = [row["diagnosis"] for part in source.parts() for row in source.read(part)]
        assert (
            sorted(rows)
            == sorted(source.dataset()["diagnosis"])
            == ["eczema", "melanoma", "melanoma", "psoriasis"]
        )
    assert "an alias of an ISIC class is read as that class" in " ".join(
        line
        for source in [find_source(uri, Classes.parse("auto"))]
        if source.describe()
        for line in source.findings.lines()
    )
    dropping = find_source(uri, Classes.parse("psoriasis", drop_others=True))
    assert dropping.describe().diagnoses == {"psoriasis": 1}
    assert dropping.dataset()["isic_id"][:] == [row["isic_id"] for row in dropping.metadata()]
    assert any("left out, of other classes" in line for line in dropping.findings.lines())
    assert find_source(uri, Classes.parse("none")).describe().diagnoses == {"unknown": 4}


def test_a_prepared_folder_declares_its_classes(tmp_path):
    uri = _folders(tmp_path / "set")
    with pytest.raises(DataError, match="psoriasis"):
        prepare(tmp_path / "out", [(None, uri)], Preparation(size=16))
    classes = Classes.parse("psoriasis,eczema")
    manifest = prepare(tmp_path / "out", [("train", uri)], Preparation(size=16), classes=classes)
    assert manifest.classes == ["psoriasis", "eczema", "melanoma"]
    info = find_source(f"prepared:{tmp_path / 'out'}").describe()
    assert (info.classes, info.diagnoses["melanoma"]) == (manifest.classes, 2)


def test_names_are_taken_as_they_are_written():
    names = ["3", "a/b", "Café au lait", "unknown", "none", "solar lentigo", "x y"]
    classes = Classes.parse(names)
    assert [classes.resolve(name) for name in names] == names
    assert classes.resolve("Cafe\u0301 au lait") == "Café au lait", "another Unicode form"
    assert classes.resolve("X  Y") == "x y"
    assert classes.resolve("seborrheic keratosis") == "benign_keratosis", (
        "ISIC's classes are known beside declared ones"
    )
    assert Classes.parse(["nevus", "blue nevus"]).names == ("nevus", "blue nevus")
    assert Classes.parse(["mel", "melanoma", "MEL"]).names == ("melanoma",)
    assert Classes.parse([1, 2]).names == ("1", "2")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (["Eczema", "eczema"], "'Eczema' and 'eczema' differ in case alone"),
        ([True], "which is not text: write it in quotes"),
        ([" "], "is no name of a class"),
        (["a\nb"], None),
        ([], "classes is empty"),
    ],
)
def test_what_is_no_list_of_classes_is_refused(declared, message):
    if message is None:
        assert Classes.parse(declared).names == ("a b",)
        return
    with pytest.raises(ValueError, match=message):
        Classes.parse(declared)


def test_names_that_differ_in_case_alone_are_refused_unless_one_is_declared(tmp_path):
    rows = [{"image": _png(i), "isic_id": str(i), "dx": dx} for i, dx in enumerate(["Eczema", "eczema"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    uri = f"parquet:{tmp_path / 'a.parquet'}"
    with pytest.raises(DataError, match="'Eczema' and 'eczema' differ in case alone"):
        find_source(uri, Classes.parse("auto")).describe()
    assert find_source(uri, Classes.parse("Eczema")).describe().diagnoses == {"Eczema": 2}


@given(
    st.lists(st.sampled_from(["a", "b", "3", "nevus", "melanoma", "unknown"])),
    st.permutations(["b", "a", "3"]),
)
def test_order_is_that_of_the_declaration_then_isic_then_the_name(present, declared):
    expected = [n for n in declared if n in present] + [n for n in ISIC if n in present]
    assert ordered_classes(present, declared) == expected
    assert ordered_classes(present) == [n for n in ISIC if n in present] + sorted(
        {"a", "b", "3"} & set(present)
    )


def test_a_thousand_classes():
    classes = Classes.parse([f"class {number}" for number in range(1000)])
    reading = Reading(classes, is_strict=False)
    assert all(reading.name_class(f"CLASS {number}", "") == f"class {number}" for number in range(1000))
    reading.name_class("odd", "")
    with pytest.raises(DataError, match=r"'odd' \(1 image\) is not a known class.* and 990 more") as error:
        reading.check("x")
    assert len(str(error.value)) < 1000


@given(st.integers(0, 20), st.integers(2, 30))
def test_a_class_is_never_in_validation_alone(seed, number):
    rows = [{"isic_id": str(i), "lesion_id": None, "patient_id": None, "diagnosis": "rare" if i == 0 else "nevus"}
            for i in range(number)]  # fmt: skip
    assignments = assign_splits(rows, {"validation": 0.5, "test": 0.3}, seed)
    for name in ("rare", "nevus"):
        assert "train" in {
            a.split for a, row in zip(assignments, rows, strict=True) if row["diagnosis"] == name
        }
    try:
        train, _ = split_rows(rows, 0.5, seed)
    except DataError:
        return
    assert 0 in train


def test_what_was_assigned_once_stays_though_its_class_is_in_validation_alone():
    old = [{"isic_id": "a", "lesion_id": None, "patient_id": None, "diagnosis": "rare"}]
    new = [{"isic_id": "b", "lesion_id": None, "patient_id": None, "diagnosis": "rare"}]
    (assignment,) = assign_splits(new, {"validation": 0.99}, 0, None, old, [Assignment("validation")])
    assert assignment.split == "train"
