"""`isic-vq encode` in several real processes, started as users start them."""

import pytest
from launching import run, torchrun

from isic_vq.data.code_cache import read_code_cache


@pytest.mark.slow
def test_torchrun_encodes_what_one_process_does(tiny_run, tmp_path, monkeypatch):
    command = ["-m", "isic_vq", "encode", tiny_run.vqvae / "model", "--data", "synthetic:520:0", "--views", 2]
    outputs = [tmp_path / "one.parquet", tmp_path / "two.parquet"]
    for processes, output in zip((1, 2), outputs, strict=True):
        code, log = run(torchrun(*command, "-o", output, processes=processes), tmp_path / f"{processes}.log")
        assert code == 0, log
        assert f"wrote the codes of 520 images in 2 views to {output}" in log
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert len(read_code_cache(outputs[0]).isic_ids) == 520
