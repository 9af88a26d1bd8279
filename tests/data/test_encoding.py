"""Encoding in chunks: the same bytes whoever encodes, and however often it was interrupted."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from isic_vq.data import encoding as encoding_module
from isic_vq.data.code_cache import read_code_cache
from isic_vq.data.encoding import Encoding, encode_source, encode_to_file
from isic_vq.data.parts import open_part
from isic_vq.data.schema import DataError
from isic_vq.models.configuration_vqvae import VQVAEConfig
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.models.modeling_vqvae import VQVAEModel
from stream_only import StreamOnly

NUMBER = 40


def make_encoding(uri="synthetic:40:0", records=None, seed=0, **options):
    torch.manual_seed(seed)
    model = VQVAEModel(
        VQVAEConfig(image_size=16, hidden_sizes=(8, 8), num_codes=16, code_dim=4, residual_size=4)
    ).eval()
    opened, source = open_part(uri)
    records = opened if records is None else records
    return Encoding(
        model, IsicVQImageProcessor(size=16), records, source, **{"num_views": 2, "batch_size": 4, **options}
    )


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(encoding_module, "CHUNK_SIZE", 8)


@pytest.fixture
def expected(tmp_path):
    assert encode_to_file(make_encoding(), tmp_path / "expected.parquet") == NUMBER
    return (tmp_path / "expected.parquet").read_bytes()


def test_chunks_give_what_one_piece_gives(expected, tmp_path):
    found = read_code_cache(tmp_path / "expected.parquet")
    whole = make_encoding()
    cache = encode_source(
        whole.model, whole.processor, whole.records, whole.source, num_views=2, batch_size=4
    )
    assert np.array_equal(found.codes, cache.codes)
    assert found.isic_ids == cache.isic_ids == whole.records["isic_id"][:]
    assert not (tmp_path / "expected.parquet.parts").exists()


@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(world, expected, tmp_path):
    output = tmp_path / "codes.parquet"
    found = [encode_to_file(make_encoding(), output, rank, world) for rank in range(world)]
    assert found == [None] * (world - 1) + [NUMBER]
    assert output.read_bytes() == expected


def test_a_streamed_source_gives_the_same_codes(expected, tmp_path):
    streamed = make_encoding(records=StreamOnly())
    encode_to_file(streamed, tmp_path / "codes.parquet", 0, 1)
    found, whole = read_code_cache(tmp_path / "codes.parquet"), read_code_cache(tmp_path / "expected.parquet")
    assert np.array_equal(found.codes, whole.codes)
    assert (found.isic_ids, found.diagnoses) == (whole.isic_ids, whole.diagnoses)


def _encode_slowly(output, rank, world):
    torch.set_num_threads(1)
    encode_chunk = encoding_module._encode_chunk

    def slowly(*arguments):
        time.sleep(0.2)
        return encode_chunk(*arguments)

    encoding_module._encode_chunk = slowly
    encode_to_file(make_encoding(), output, rank, world)


def test_a_killed_run_goes_on_with_another_number_of_processes(expected, tmp_path, monkeypatch):
    output = tmp_path / "codes.parquet"
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_encode_slowly, args=(output, rank, 2)) for rank in range(2)]
    for child in children:
        child.start()
    work, until = tmp_path / "codes.parquet.parts", time.monotonic() + 60
    while len(list(work.glob("chunk-*.parquet"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.01)
    for child in children:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert not output.exists()
    there = len(list(work.glob("chunk-*.parquet")))
    made = []
    encode_chunk = encoding_module._encode_chunk
    monkeypatch.setattr(encoding_module, "_encode_chunk", lambda *a: made.append(1) or encode_chunk(*a))
    assert encode_to_file(make_encoding(), output) == NUMBER
    assert len(made) == 5 - there
    assert output.read_bytes() == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "tokenizer_hash"),
        ({"uri": "synthetic:39:0"}, "source.name"),
        ({"num_views": 3}, "num_views = 2, and this is 3"),
    ],
)
def test_chunks_of_other_settings_are_refused(change, named, tmp_path):
    output = tmp_path / "codes.parquet"
    assert encode_to_file(make_encoding(), output, 0, 2) is None
    with pytest.raises(
        DataError, match=f"codes.parquet.parts was begun with {named}.*: resume it with the same"
    ):
        encode_to_file(make_encoding(**change), output, 1, 2)
    assert json.loads((tmp_path / "codes.parquet.parts" / "settings.json").read_text())["num_views"] == 2


def test_corrupt_images_are_counted_over_all_chunks(image_folder, tmp_path):
    (image_folder / "002.png").write_text("this is no image")
    uri = f"folder:{image_folder}"
    with pytest.raises(DataError, match=r"1 of \d+ images are corrupt, more than the allowed share of 0.01"):
        encode_to_file(make_encoding(uri), tmp_path / "a.parquet")
    assert encode_to_file(make_encoding(uri, max_corrupt_share=0.1), tmp_path / "b.parquet") == 15
    assert encode_to_file(make_encoding(uri, max_corrupt_share=0.1), tmp_path / "a.parquet") == 15, (
        "the chunks stayed"
    )


def test_too_many_corrupt_images_are_named_and_stop_the_first_chunk(image_folder, tmp_path, caplog):
    (image_folder / "000.png").write_text("this is no image")
    with pytest.raises(DataError, match="1 of 4 images are corrupt"):
        encode_to_file(make_encoding(f"folder:{image_folder}"), tmp_path / "codes.parquet")
    assert "Skipped a corrupt image: SYNTHETIC_0_0000000" in caplog.text
    assert not list((tmp_path / "codes.parquet.parts").glob("chunk-*"))


def test_corrupt_images_of_chunks_that_were_there_count_when_they_are_joined(image_folder, tmp_path):
    for name in ("000.png", "001.png"):
        (image_folder / name).write_text("this is no image")
    uri, output = f"folder:{image_folder}", tmp_path / "codes.parquet"
    assert encode_to_file(make_encoding(uri, max_corrupt_share=1), output, 0, 2) is None
    with pytest.raises(
        DataError, match="2 of 16 images are corrupt, more than the allowed share of 0.1, for"
    ):
        encode_to_file(make_encoding(uri, max_corrupt_share=0.1), output, 1, 2)
    assert not output.exists()


def test_a_process_that_comes_late_leaves_nothing_behind(expected, tmp_path, monkeypatch):
    output = tmp_path / "codes.parquet"
    assert encode_to_file(make_encoding(), output) == NUMBER
    monkeypatch.setattr(encoding_module, "_encode_chunk", None)  # it has nothing to encode
    assert encode_to_file(make_encoding(), output, 1, 2) == NUMBER
    assert output.read_bytes() == expected
    assert not (tmp_path / "codes.parquet.parts").exists()


def test_a_process_whose_chunks_are_joined_while_it_works_leaves_nothing_behind(
    expected, tmp_path, monkeypatch
):
    output, work = tmp_path / "codes.parquet", tmp_path / "codes.parquet.parts"
    encode_chunk = encoding_module._encode_chunk

    def overtaken(*arguments):
        if not output.exists():
            monkeypatch.setattr(encoding_module, "_encode_chunk", encode_chunk)
            encode_to_file(make_encoding(), output)
            assert not work.exists()
        return encode_chunk(*arguments)

    monkeypatch.setattr(encoding_module, "_encode_chunk", overtaken)
    assert encode_to_file(make_encoding(), output, 0, 2) == NUMBER
    assert output.read_bytes() == expected
    assert not work.exists()


def test_codes_of_other_images_are_replaced(expected, tmp_path):
    output = tmp_path / "codes.parquet"
    assert encode_to_file(make_encoding("synthetic:8:1"), output) == 8
    assert encode_to_file(make_encoding(), output) == NUMBER
    assert output.read_bytes() == expected


def test_a_file_that_holds_no_codes_is_never_replaced(tmp_path):
    output = tmp_path / "metadata.csv"
    for content in (b"file_name,diagnosis\na.jpg,nevus\n", b""):
        output.write_bytes(content)
        with pytest.raises(
            DataError, match=r"metadata.csv is there and is no parquet file: choose another name"
        ):
            encode_to_file(make_encoding(), output)
        assert output.read_bytes() == content
        assert os.listdir(tmp_path) == ["metadata.csv"]


def test_the_number_of_threads_decides_nothing(expected, tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        encode_to_file(make_encoding(), tmp_path / "codes.parquet")
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "codes.parquet").read_bytes() == expected


def test_an_interruption_says_how_to_go_on(tmp_path, monkeypatch):
    encode_chunk = encoding_module._encode_chunk

    def interrupted(encoding, chunk, counter):
        if chunk.start == 16:
            raise KeyboardInterrupt
        return encode_chunk(encoding, chunk, counter)

    monkeypatch.setattr(encoding_module, "_encode_chunk", interrupted)
    with pytest.raises(KeyboardInterrupt, match="2 of 5 chunks are finished; run the same command to resume"):
        encode_to_file(make_encoding(), tmp_path / "codes.parquet")
