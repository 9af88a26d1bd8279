"""Tables are read strictly, and what a source leaves out is named and counted."""

import codecs
import io
import json
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source
from isic_vq.data.synthetic_images import synthetic_image
from isic_vq.data.tables import read_table

ROWS = [{"file_name": "a.jpg", "dx": "mel"}, {"file_name": "b.jpg", "dx": "x, y"}]


def test_delimiters_suffixes_headers_and_encodings():
    text = 'File_Name{0} DX \na.jpg{0}mel\n"b.jpg"{0}"x, y"\n\n'
    for delimiter, name in ((",", "a.csv"), (";", "a.CSV"), ("\t", "a.tsv"), ("\t", "a.TAB"), ("|", "a.csv")):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            for newline in ("\n", "\r\n"):
                content = text.format(delimiter).replace("\n", newline).encode(encoding)
                assert read_table(content, name) == ROWS
    lines = "\n".join(json.dumps({key.upper(): value for key, value in row.items()}) for row in ROWS)
    assert read_table(lines.encode(), "metadata.JSONL") == ROWS


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4), st.sampled_from(",;\t|"))
def test_what_the_standard_library_writes_comes_back(rows, delimiter):
    import csv

    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("one", "two"), *rows])
    expected = [{"one": one, "two": two} for one, two in rows if one.strip() or two.strip()]
    if not expected:
        with pytest.raises(DataError, match="has no rows"):
            read_table(sink.getvalue().encode(), "t.csv")
        return
    assert read_table(sink.getvalue().encode(), "t.csv") == expected


def test_json_lines_end_at_newlines_alone():
    text = "a\u2028b\u0085c\x0cd"
    line = json.dumps({"file_name": text}, ensure_ascii=False)
    assert read_table(f"{line}\n{line}\n".encode(), "t.jsonl") == [{"file_name": text}] * 2


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"a,b\n", "t.csv", "t.csv has no rows"),
        (b"", "t.csv", "t.csv has no rows"),
        (b"a, A\n1,2\n", "t.csv", "t.csv has the column a twice"),
        (b"a,b\n1,2\n1,2,3\n", "t.csv", "t.csv, row 1 has 3 cells, the header 2: '3' is in no column"),
        (b"a,b\n1\n", "t.csv", "row 0 has 1 cells, the header 2: it ends before the column b"),
        (b'a,b\n1,"2\n3,4\n', "t.csv", "t.csv, row 0, line 2: unexpected end of data"),
        (b'a,b\n1,"2" x\n', "t.csv", "row 0, line 2: ',' expected after '\"'"),
        ("a\nH\u00f4pital\n".encode("latin-1"), "t.csv", r"t.csv is not UTF-8 text \(line 2\)"),
        ("a\nx\n".encode("utf-16-le"), "t.csv", "holds the character NUL"),
        (codecs.BOM_UTF16_LE + b"a", "t.csv", "is not UTF-8 text"),
        (b'{"a": 1, "A": 2}', "t.jsonl", "t.jsonl, line 1 has the column a twice"),
        (
            b'{"a": 1}\n[1]\n{',
            "t.jsonl",
            "2 rows cannot be used: t.jsonl, line 2 is a list.* line 3 is not JSON",
        ),
    ],
)
def test_what_cannot_be_read_for_sure_is_named(content, name, message):
    with pytest.raises(DataError, match=message):
        read_table(content, name)


def test_large_cells_are_read():
    assert read_table(b"a,b\n1," + b"x" * 200_000, "t.csv")[0]["b"] == "x" * 200_000


def _images(folder, *names):
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        synthetic_image(index, 0, size=16).save(folder / name)


def test_all_rows_that_cannot_be_used_are_reported_together(tmp_path):
    _images(tmp_path, *(f"{index:02d}.png" for index in range(15)))
    rows = "".join(f"{index:02d}.png,{'old' if index > 2 else 40}\n" for index in range(15))
    (tmp_path / "metadata.csv").write_text(f"file_name,age\n{rows}")
    with pytest.raises(
        DataError, match=r"12 rows cannot be used: metadata.csv, row 3 .*row 12 .* and 2 more"
    ) as error:
        find_source(f"folder:{tmp_path}").describe()
    assert "row 13" not in str(error.value)


def test_folder_counts_what_it_leaves_out(tmp_path):
    _images(
        tmp_path, *(f"nevus/ISIC_0000001{end}" for end in (".jpg", "_segmentation.png", "_superpixels.png"))
    )
    _images(
        tmp_path,
        "nevus/ISIC_0000001_downsampled.jpg",
        "bkl/ISIC_0000002_downsampled.jpg",
        "bkl/x.png",
        "bkl/x_mask.png",
    )
    _images(tmp_path, "bkl/y_mask.png", "bkl/.hidden.png", "elsewhere/df/z.png")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "elsewhere" / "df" / "loop").symlink_to(tmp_path)
    (tmp_path / "vasc").symlink_to(tmp_path / "elsewhere" / "df")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    source = find_source(f"folder:{tmp_path}")
    found = {row["isic_id"]: row["diagnosis"] for row in source.metadata()}
    assert found == {
        "ISIC_0000001": "nevus", "ISIC_0000002": "benign_keratosis", "x": "benign_keratosis",
        "y_mask": "benign_keratosis", "z": "dermatofibroma",
    }  # fmt: skip
    assert {reason: len(names) for reason, names in source.findings.left_out.items()} == {
        "a mask or superpixels": 3, "a copy of less resolution": 1, "hidden": 1, "a broken link or no file": 1,
        "a link to a folder that is read already": 2, "no image by its name": 1,
    }  # fmt: skip
    assert any(
        line.startswith("left out, a mask or superpixels: 3, for example") for line in source.findings.lines()
    )


def test_images_in_no_row_and_columns_that_are_not_read_are_counted(tmp_path):
    _images(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("file_name,dx,kind\na.png,nv,1\n")
    source = find_source(f"folder:{tmp_path}")
    source.describe()
    assert source.findings.notes == {
        "columns of metadata.csv that are not read": ["kind"], "images without a row in metadata.csv": ["b.png"]
    }  # fmt: skip


def test_tar_counts_what_it_leaves_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in (
            "mel/p1.2020.jpg",
            "mel/p1.2021.jpg",
            "mel/p1.2021_segmentation.png",
            "mel/._x.jpg",
            "notes.txt",
        ):
            tar.addfile(tarfile.TarInfo(name))
    source = find_source(f"webdataset:{tmp_path / 'a.tar'}")
    assert [(row["isic_id"], row["diagnosis"]) for row in source.metadata()] == [
        ("p1.2020", "melanoma"), ("p1.2021", "melanoma")
    ]  # fmt: skip
    assert source.findings.left_out == {
        "a mask or superpixels": ["mel/p1.2021_segmentation.png"], "hidden": ["mel/._x.jpg"],
        "no image by its name": ["notes.txt"],
    }  # fmt: skip
