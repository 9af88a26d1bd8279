"""Files with some bytes or values changed: each is read, or refused with a message, in bounded time and memory."""

import copy
import io
import json
import shutil
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from isic_vq import IsicVQModel
from isic_vq.codec.codec import compress, decompress
from isic_vq.data.schema import normalise
from isic_vq.data.sources import find_source
from isic_vq.data.sources.image_files import read_sidecar
from isic_vq.data.tables import read_table
from isic_vq.hub.pretrained import load_model
from isic_vq.training.load import load_recipe
from isic_vq.training.recipe import VQVAERecipe
from tiny_repository import write_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc"),
]

REFUSALS = (ValueError, OSError, RuntimeError, ImportError)  # what commands tell in one line
SECONDS, BYTES = 10, 2**30
VALUES = [None, True, -1, 0, 1, 2**31, 10**30, 1e308, -0.5, float("nan"), "", "x", "../x", "é", "1" * 500]
VALUES += [[], [1], [[]], {}, {"a": 1}]

CSV = b'file_name,diagnosis,age,sex\na.jpg,melanoma,50,male\n"b.jpg",nevus,40,female\n'
JSON_LINES = (
    b'{"file_name": "a.jpg", "diagnosis": "melanoma"}\n{"file_name": "b.jpg", "diagnosis": "nevus"}\n'
)
SIDECAR = {
    "isic_id": "ISIC_0000001",
    "metadata": {
        "clinical": {"diagnosis_1": "Malignant", "age_approx": 5},
        "acquisition": {"pixels_x": 4},
    },
    "dataset": {"name": "a", "license": "CC0"},
}
RECIPE = b"stage: vqvae\ndata:\n  train: synthetic:8\nloop:\n  max_steps: 5\n  learning_rate: 1e-3\n"


def changed_bytes(content):
    """A strategy: up to six pieces of the content replaced."""
    edits = st.tuples(st.integers(0, len(content)), st.integers(0, 20), st.binary(max_size=9))

    def edited(pieces):
        result = bytearray(content)
        for start, length, replacement in pieces:
            result[start : start + length] = replacement
        return bytes(result)

    return st.lists(edits, min_size=1, max_size=6).map(edited)


def places(value, path=()):
    """Keys that lead to each value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ([*path, key], *places(inner, (*path, key)))]


def changed_json(value):
    """A strategy: one to three values inside a JSON value replaced or removed."""
    edits = st.tuples(
        st.sampled_from(places(value)),
        st.sampled_from(range(len(VALUES) + 1)).map(lambda i: VALUES[i : i + 1]),
    )

    def edited(changes):
        result = copy.deepcopy(value)
        for (*parents, last), replacement in changes:
            node = result
            try:
                for key in parents:
                    node = node[key]
                if replacement:
                    node[last] = copy.deepcopy(replacement[0])
                else:
                    del node[last]
            except (KeyError, IndexError, TypeError):
                continue  # an earlier change took the place away
        return result

    return st.lists(edits, min_size=1, max_size=3).map(edited)


def peak():
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        if line.startswith("VmHWM")
    )


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    """Reads a file; files that appear outside its folder and memory are looked at when all were read."""
    folder = tmp_path_factory.mktemp("fuzz")
    home = folder / "a" / "b"
    home.mkdir(parents=True)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # peak memory counts from here
    before = peak()

    def read(reader):
        start, message = time.process_time(), "read"
        try:
            reader(home)
        except REFUSALS as error:
            message = str(error)
        assert 0 < len(message) < 3000
        assert time.process_time() - start < SECONDS

    yield read
    assert peak() - before < BYTES
    assert [path.name for path in (*folder.iterdir(), *(folder / "a").iterdir())] == ["a", "b"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder / "model"


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(IsicVQModel, str(model_folder))


@pytest.fixture(scope="module")
def compressed(model):
    codes = torch.randint(8, (11, 4, 4), generator=torch.Generator().manual_seed(0))
    return compress(model, codes, [f"a{index}.png" for index in range(11)], lanes=4).content


def normalised(rows):
    for number, row in enumerate(rows):
        normalise(row, f"row {number}")


@settings(max_examples=300, deadline=None)
@given(content=changed_bytes(CSV))
@example(content=CSV)
def test_tables_of_commas(check, content):
    check(lambda folder: normalised(read_table(content, "metadata.csv")))


@settings(max_examples=300, deadline=None)
@given(content=changed_bytes(JSON_LINES))
@example(content=JSON_LINES)
def test_tables_of_json_lines(check, content):
    check(lambda folder: normalised(read_table(content, "metadata.jsonl")))


@settings(max_examples=300, deadline=None)
@given(record=changed_json(SIDECAR))
@example(record=SIDECAR)
def test_sidecars(check, record):
    content = json.dumps(record).encode()
    check(lambda folder: normalise({"file_name": "a.jpg", **read_sidecar(content, "a.json")}, "a.json"))


@settings(max_examples=300, deadline=None)
@given(content=changed_bytes(RECIPE))
@example(content=RECIPE)
def test_recipes(check, content):
    def read(folder):
        (folder / "r.yaml").write_bytes(content)
        load_recipe(VQVAERecipe, folder / "r.yaml", [])

    check(read)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_compressed_files(check, model, compressed, data):
    content = data.draw(changed_bytes(compressed))
    check(lambda folder: decompress(model, content))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_of_models(check, model_folder, name):
    original = json.loads((model_folder / name).read_text(encoding="utf-8"))

    @settings(max_examples=60, deadline=None)
    @given(value=changed_json(original))
    @example(value=original)
    def reads_or_refuses(value):
        def read(folder):
            copied = shutil.copytree(model_folder, folder / "model", dirs_exist_ok=True)
            (copied / name).write_text(json.dumps(value), encoding="utf-8")
            load_model(IsicVQModel, str(copied))

        check(read)

    reads_or_refuses()


@settings(max_examples=60, deadline=None)
@given(column=st.sampled_from(["image", "isic_id", "diagnosis", "age", "sex"]), value=st.sampled_from(VALUES))
def test_columns_of_parquet_files(check, column, value):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    columns = {
        "image": [{"bytes": picture.getvalue(), "path": "a.png"}],
        "isic_id": ["a"],
        "diagnosis": ["nevus"],
        "age": [5.0],
        "sex": ["male"],
    }
    try:
        table = pyarrow.table(columns | {column: [value]})
        pyarrow.parquet.write_table(table, picture := io.BytesIO())
    except (pyarrow.ArrowException, OverflowError):
        return  # no parquet file can hold it

    def read(folder):
        (folder / "p.parquet").write_bytes(picture.getvalue())
        for _ in find_source(f"parquet:{folder / 'p.parquet'}").stream():
            pass

    check(read)
