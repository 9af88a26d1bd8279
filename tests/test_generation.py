"""Sets of images in shards: the same files however many processes make them, and whatever becomes of these."""

import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from isic_vq import (
    IsicVQConfig,
    IsicVQImageProcessor,
    IsicVQModel,
    PixelCNNConfig,
    PixelCNNModel,
    __version__,
)
from isic_vq.data.schema import DataError
from isic_vq.data.shards import Sample, read_shard, to_png, write_shard
from isic_vq.data.sources import describe_source, open_source
from isic_vq.generate import generate_shards
from isic_vq.hub.pretrained import load_model
from isic_vq.work import launched_process

CLASSES = {0: "melanoma", 1: "nevus", 2: "dermatofibroma"}
SUFFIX = {"parquet": ".parquet", "webdataset": ".tar"}
TIMEOUT = 300  # seconds after which a command hangs, even on a busy machine


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A whole model for 16 x 16 pixels in 4 x 4 codes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    vqvae = {"image_size": 16, "hidden_sizes": (4, 8), "num_residual_blocks": 1, "residual_size": 4}
    prior = {"grid_size": 4, "hidden_size": 8, "num_layers": 1, "first_kernel_size": 3, "head_size": 8}
    config = IsicVQConfig(
        vqvae_config={**vqvae, "num_codes": 300, "code_dim": 4},  # more than a byte holds
        prior_config={**prior, "num_codes": 300, "id2label": CLASSES},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        IsicVQModel(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(model_folder):
    return load_model(IsicVQModel, str(model_folder)).cpu()


SETTINGS = {"num_images": 40, "labels": ["mel", "nv"], "seed": 3, "images_per_shard": 16, "backend": "eager"}


def make(model, folder, **settings):
    """Generate 40 images in shards of 16, 16 and 8."""
    return generate_shards(model, folder, **{**SETTINGS, **settings})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(num_shards, suffix=".parquet"):
    return [f"images-{shard:05d}-of-{num_shards:05d}{suffix}" for shard in range(num_shards)]


def samples(folder):
    """All samples of a folder, in the order of its shards."""
    return [sample for path in sorted(folder.glob("images-*")) for sample in read_shard(path)]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def generated(model, num_images, labels, seed=3):
    """Pixels `(N, H, W, 3)` and codes `(N, h w)` of one call of the model."""
    output = model.generate(num_images, labels, seed=seed, backend="eager")
    images = IsicVQImageProcessor(size=16).postprocess(output.pixel_values, output_type="np")
    return images, output.codes.flatten(1).tolist()


# What is in a shard


def test_parquet_is_read_by_datasets_as_images_with_all_that_made_them(model, tmp_path):
    make(model, tmp_path)
    rows = datasets.load_dataset("parquet", data_files=f"{tmp_path}/*.parquet", split="train")
    assert rows.features["image"] == datasets.Image()
    assert rows.features["label"].names == list(CLASSES.values())
    assert rows.features["codes"] == datasets.List(datasets.Value("uint16"), length=16)
    images, codes = generated(model, 40, ["melanoma", "nevus"] * 20)
    assert np.array_equal(np.stack([np.asarray(row["image"]) for row in rows]), images)
    assert rows["codes"][:] == codes
    assert rows["label"][:] == [0, 1] * 20
    assert rows["index"][:] == list(range(40))
    assert set(rows["seed"]) == {3}
    assert set(rows["model"]) == {"tiny"}
    assert set(rows["isic_vq"]) == {__version__}


def test_parquet_is_a_source_of_images_for_training(model, tmp_path):
    make(model, tmp_path, num_images=16)
    rows = open_source(f"parquet:{tmp_path}/*.parquet")
    assert rows["diagnosis"][:] == ["melanoma", "nevus"] * 8
    assert rows["isic_id"][:3] == ["00000000", "00000001", "00000002"]
    assert describe_source(f"parquet:{tmp_path}/*.parquet").diagnoses == {"melanoma": 8, "nevus": 8}


def test_images_without_a_diagnosis_have_no_label(model, tmp_path):
    make(model, tmp_path, labels=None)
    rows = datasets.load_dataset("parquet", data_files=f"{tmp_path}/*.parquet", split="train")
    assert rows["label"][:] == [None] * 40
    assert np.array_equal(np.asarray(rows[20]["image"]), generated(model, 40, None)[0][20])
    assert describe_source(f"parquet:{tmp_path}/*.parquet").diagnoses == {"unknown": 40}


def test_tar_has_a_png_and_a_json_per_image_and_nothing_of_the_machine(model, tmp_path):
    make(model, tmp_path, format="webdataset")
    images, codes = generated(model, 40, ["melanoma", "nevus"] * 20)
    found = []
    for name in names(3, ".tar"):
        with tarfile.open(tmp_path / name) as tar:
            for member in tar:
                found.append(member.name)
                content, index = tar.extractfile(member).read(), int(member.name[:8])
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                if member.name.endswith(".png"):
                    assert np.array_equal(pixels(content), images[index])
                    continue
                about = json.loads(content)
                assert re.fullmatch("[0-9a-f]{16}", about.pop("run"))
                expected = {"seed": 3, "index": index, "codes": codes[index], "model": "tiny"}
                expected |= {"label": ["melanoma", "nevus"][index % 2], "isic_vq": __version__}
                assert about == expected
    assert found == [f"{index:08d}.{suffix}" for index in range(40) for suffix in ("png", "json")]


def test_tar_is_read_by_datasets(model, tmp_path):
    make(model, tmp_path, format="webdataset", num_images=16)
    rows = datasets.load_dataset("webdataset", data_files=f"{tmp_path}/*.tar", split="train")
    assert [row["json"]["index"] for row in rows] == list(range(16))
    assert np.array_equal(np.asarray(rows[5]["png"]), pixels(samples(tmp_path)[5].image))


@pytest.mark.parametrize("suffix", SUFFIX.values())
def test_shard_reads_back_as_it_was_written(tmp_path, suffix):
    image = to_png(np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8))
    written = [
        Sample(image, label, 2**63 - 1, index, [0, 2**16 - 1], "a", "0.1", "f" * 16)
        for index, label in ((7, "nevus"), (123456789, None))
    ]
    write_shard(tmp_path / f"shard{suffix}", written, ["melanoma", "nevus"])
    assert read_shard(tmp_path / f"shard{suffix}") == written


def test_readers_load_a_few_images_at_a_time(model, tmp_path):
    make(model, tmp_path, num_images=144, images_per_shard=144)
    metadata = pyarrow.parquet.read_metadata(tmp_path / names(1)[0])
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [128, 16]


# The same set, however it is made


@pytest.mark.parametrize("shard_format", SUFFIX)
def test_any_number_of_processes_makes_the_same_bytes(model, tmp_path, shard_format):
    for world in (1, 2, 3, 5):
        counts = [
            make(model, tmp_path / str(world), format=shard_format, rank=rank, world=world)
            for rank in reversed(range(world))
        ]
        assert sum(made for made, _ in counts) == 3
    whole = contents(tmp_path / "1")
    assert set(whole) == {"generation.json", *names(3, SUFFIX[shard_format])}
    assert all(contents(tmp_path / str(world)) == whole for world in (2, 3, 5))


def test_images_do_not_depend_on_how_they_are_cut_into_shards(model, tmp_path):
    for size in (16, 32, 48):
        make(model, tmp_path / str(size), images_per_shard=size)
    first, *others = ([(s.image, s.codes, s.label) for s in samples(tmp_path / str(n))] for n in (16, 32, 48))
    assert len({image for image, _, _ in first}) == 40, "all are different"
    assert all(other == first for other in others)


def test_it_computes_on_one_thread_and_leaves_the_callers_number_alone(model, tmp_path):
    threads, seen = torch.get_num_threads(), []
    hook = model.vqvae.decoder.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        make(model, tmp_path, num_images=16)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
        hook.remove()
    assert set(seen) == {1}


def test_sampling_settings_reach_the_model(model, tmp_path):
    make(model, tmp_path, num_images=16, labels="nevus", temperature=0.5, top_k=5, guidance_scale=2)
    sampling = {"temperature": 0.5, "top_k": 5, "guidance_scale": 2.0}
    expected = model.generate(16, "nevus", seed=3, backend="eager", **sampling).codes
    assert [sample.codes for sample in samples(tmp_path)] == expected.flatten(1).tolist()


def test_settings_that_older_versions_did_not_have_are_named_when_given(model, tmp_path):
    make(model, tmp_path / "old", num_images=16)
    assert not {"cluster", "guidance_power"} & set(
        json.loads((tmp_path / "old" / "generation.json").read_text())
    )
    sampling = {"guidance_scale": 3.0, "guidance_power": 2.0}
    make(model, tmp_path / "new", num_images=16, labels="nevus", **sampling)
    expected = model.generate(16, "nevus", seed=3, backend="eager", **sampling).codes
    assert [sample.codes for sample in samples(tmp_path / "new")] == expected.flatten(1).tolist()


def test_a_cluster_is_a_setting_of_the_set(model, tmp_path):
    config = PixelCNNConfig(**model.prior.config.to_diff_dict() | {"num_clusters": 2})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = PixelCNNModel(config)
        for parameter in prior.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape)
    clustered = IsicVQModel.from_parts(model.vqvae, prior)
    make(clustered, tmp_path, num_images=16, labels="nevus", cluster=1)
    expected = clustered.generate(16, "nevus", seed=3, backend="eager", cluster=1).codes
    assert [sample.codes for sample in samples(tmp_path)] == expected.flatten(1).tolist()
    with pytest.raises(ValueError, match="was begun with cluster = 1"):
        make(clustered, tmp_path, num_images=16, labels="nevus")
    with pytest.raises(ValueError, match="this prior has none"):
        make(model, tmp_path / "other", cluster=1)
    assert not (tmp_path / "other").exists()


# Diagnoses that take turns


def test_diagnoses_take_turns_over_the_whole_set_so_that_it_is_balanced(model, tmp_path):
    make(model, tmp_path, num_images=48, labels=["df", "mel", "nv"])
    found = [sample.label for sample in samples(tmp_path)]
    assert found == ["dermatofibroma", "melanoma", "nevus"] * 16, "16 is no multiple of 3: turns cross shards"
    assert set(Counter(found).values()) == {16}


def test_aliases_of_a_diagnosis_are_the_same_set(model, tmp_path):
    make(model, tmp_path, labels=["mel", "nv"], temperature=1)
    assert make(model, tmp_path, labels=["melanoma", 1], temperature=1.0) == (0, 3)


# Going on


def test_second_run_makes_only_what_is_missing(model, tmp_path):
    make(model, tmp_path)
    whole = contents(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / names(3)[1]).unlink()
    assert make(model, tmp_path) == (1, 2)
    assert contents(tmp_path) == whole
    changed = {path.name for path in tmp_path.iterdir() if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {names(3)[1]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_images", 41),
        ("num_images", 4000),
        ("labels", ["nv", "mel"]),
        ("labels", None),
        ("seed", 4),
        ("temperature", 0.9),
        ("top_k", 10),
        ("top_p", 0.9),
        ("guidance_scale", 1.5),
        ("backend", "compiled"),
        ("block_size", 8),
        ("format", "webdataset"),
        ("images_per_shard", 32),
    ],
)
def test_other_settings_than_the_folders_are_refused_by_name(model, tmp_path, key, value):
    make(model, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"was begun with {key} = .*, and this is .*choose another folder"):
        make(model, tmp_path, **{key: value})
    assert contents(tmp_path) == before


def test_other_weights_and_another_version_are_refused(model, model_folder, tmp_path):
    make(model, tmp_path, rank=0, world=2)
    other = load_model(IsicVQModel, str(model_folder)).cpu()
    with torch.no_grad():
        next(other.prior.parameters()).flatten()[0] += 1e-6
    with pytest.raises(ValueError, match="was begun with weights = "):
        make(other, tmp_path)
    manifest = tmp_path / "generation.json"
    manifest.write_text(manifest.read_text().replace(f'"{torch.__version__}"', '"1.0"'))
    with pytest.raises(ValueError, match="was begun with torch = '1.0', and this is "):
        make(model, tmp_path)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"images_per_shard": 24}, "shard of 24 images: expected a multiple of 16, .* such as 32"),
        ({"images_per_shard": 0}, "expected a multiple of 16"),
        ({"block_size": 0}, "block_size is 0"),
        ({"num_images": 0}, "num_images is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"labels": []}, "labels are empty"),
        ({"labels": ["scc"]}, "not a class of this model"),
        ({"temperature": 0}, "temperature is 0"),
        ({"format": "zip"}, "'zip': expected parquet or webdataset"),
        ({"backend": "magic"}, "backend is 'magic': expected auto, eager"),
        ({"backend": "cuda_graph"}, "cuda_graph|CUDA"),
        ({"rank": 2, "world": 2}, "process 2 of 2"),
    ],
    ids=str,
)
def test_settings_without_a_meaning_leave_no_trace(model, tmp_path, settings, error):
    with pytest.raises(ValueError, match=error):
        make(model, tmp_path, **settings)
    assert contents(tmp_path) == {}


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


def damaged(path, how):
    """What a file would hold if it had been damaged."""
    content = path.read_bytes()
    if how == "image flipped":
        return flipped(content, content.index(b"IDAT") + 20)
    if how == "codes flipped":
        group = pyarrow.parquet.read_metadata(path).row_group(0)
        chunk = next(c for c in map(group.column, range(group.num_columns)) if "codes" in c.path_in_schema)
        return flipped(content, chunk.dictionary_page_offset + chunk.total_compressed_size // 4)
    return {"cut": content[: len(content) // 2], "empty": b"", "text": b"hello"}[how]


DAMAGES = ["cut", "empty", "text", "image flipped"]


@pytest.mark.parametrize(
    ("shard_format", "how"),
    [(shard_format, how) for shard_format in SUFFIX for how in DAMAGES] + [("parquet", "codes flipped")],
)
def test_damaged_shard_is_refused_by_name_and_made_again_once_it_is_gone(model, tmp_path, shard_format, how):
    make(model, tmp_path, format=shard_format)
    whole, path = contents(tmp_path), tmp_path / names(3, SUFFIX[shard_format])[1]
    path.write_bytes(damaged(path, how))
    with pytest.raises(DataError, match=f"{path.name} .*: delete it and run the same command again"):
        make(model, tmp_path, format=shard_format)
    path.unlink()
    assert make(model, tmp_path, format=shard_format) == (1, 2)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("shard_format", SUFFIX)
def test_shard_of_another_set_under_the_same_name_is_refused(model, tmp_path, shard_format):
    make(model, tmp_path / "a", format=shard_format)
    make(model, tmp_path / "b", format=shard_format, temperature=0.5)
    first, second, _ = names(3, SUFFIX[shard_format])
    (tmp_path / "b" / first).replace(tmp_path / "a" / first)
    with pytest.raises(DataError, match=f"{first} was generated with other settings: delete it"):
        make(model, tmp_path / "a", format=shard_format)
    (tmp_path / "a" / first).write_bytes((tmp_path / "a" / second).read_bytes())
    with pytest.raises(DataError, match=f"{first} does not hold the images that its name says: delete it"):
        make(model, tmp_path / "a", format=shard_format)


def test_shards_that_are_not_of_the_set_are_not_mixed_in(model, tmp_path):
    stranger = tmp_path / "images-00000-of-00009.parquet"
    stranger.write_bytes(b"")
    refusal = f"holds {stranger.name}, not of this set: choose another folder"
    with pytest.raises(DataError, match=refusal):
        make(model, tmp_path)
    assert set(contents(tmp_path)) == {stranger.name}
    stranger.unlink()
    make(model, tmp_path)
    stranger.write_bytes(b"")
    with pytest.raises(DataError, match=refusal):
        make(model, tmp_path)


def test_manifest_that_is_none_is_refused(model, tmp_path):
    for content in ("", "[1]", "{"):
        (tmp_path / "generation.json").write_text(content)
        with pytest.raises(DataError, match="generation.json does not hold settings"):
            make(model, tmp_path)


def test_leftovers_of_a_killed_process_are_removed_by_whoever_makes_the_shard(model, tmp_path):
    leftovers = [tmp_path / f".{name}.{os.getppid()}.tmp" for name in names(3)]
    for path in leftovers:
        path.write_bytes(b"half")
    make(model, tmp_path, rank=1, world=2)
    assert [path.exists() for path in leftovers] == [True, False, True], (
        "another process may be writing those"
    )
    make(model, tmp_path, rank=0, world=1)
    assert set(contents(tmp_path)) == {"generation.json", *names(3)}


# A full disk


@contextmanager
def largest_file(size):
    """What a full disk is like: files cannot grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "failing"), [(3000, "images-00001-of-00003.parquet"), (100, "generation.json")]
)
def test_full_disk_names_the_file_and_keeps_what_is_finished(model, tmp_path, size, failing):
    if failing != "generation.json":
        make(model, tmp_path, rank=0, world=2)
    finished = contents(tmp_path)
    with largest_file(size), pytest.raises(OSError, match="finished shards stay, the same command") as error:
        make(model, tmp_path, rank=1, world=2)
    assert error.value.filename == str(tmp_path / failing)
    assert contents(tmp_path) == finished, "and no half of a file"
    assert sum(make(model, tmp_path)) == 3


# The command line


@pytest.fixture
def run_generate(run, model_folder, tmp_path):
    """Run `isic-vq generate` in this process; returns exit code, stdout and stderr."""
    return partial(run, "generate", "-m", model_folder, "-o", tmp_path, "--backend", "eager")


COMMAND = ("--shards", "parquet", "--shard-size", 16, "-l", "mel", "-l", "nv", "--seed", 3)


def test_command_writes_what_the_function_does_and_shows_progress(run_generate, model, tmp_path):
    code, stdout, stderr = run_generate("-n", 40, *COMMAND)
    assert (code, stdout) == (0, f"process 0 of 1: wrote 3 shards to {tmp_path}, 0 were complete\n")
    assert "40/40" in stderr
    assert "image" in stderr
    assert (
        run_generate("-n", 40, *COMMAND)[1]
        == f"process 0 of 1: wrote 0 shards to {tmp_path}, 3 were complete\n"
    )
    written = contents(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    make(model, tmp_path)
    assert contents(tmp_path) == written


def test_processes_take_their_shards_from_what_launchers_set(run_generate, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, stdout, stderr = run_generate("-n", 40, *COMMAND)
    assert (code, stdout) == (0, f"process 1 of 2: wrote 1 shards to {tmp_path}, 0 were complete\n")
    assert "image" not in stderr, "process 0 shows progress"
    assert set(contents(tmp_path)) == {"generation.json", names(3)[1]}


@pytest.mark.parametrize(
    ("environment", "error"),
    [
        ({"RANK": "1"}, "RANK or WORLD_SIZE is set"),
        ({"WORLD_SIZE": "2"}, "RANK or WORLD_SIZE is set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "process 2 of 2: expected a number from 0 to 1"),
    ],
    ids=str,
)
def test_launches_that_would_lose_shards_are_refused(monkeypatch, environment, error):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=error):
        launched_process()


def test_a_shard_size_without_shards_is_refused(run_generate, tmp_path):
    code, _, stderr = run_generate("-n", 2, "--shard-size", 16)
    assert code == 1
    assert stderr.strip() == (
        "error: --shard-size is given without --shards: add --shards parquet or --shards webdataset"
    )
    assert not list(tmp_path.glob("*.png"))


def test_full_disk_is_one_line(run_generate, tmp_path):
    with largest_file(3000):
        code, _, stderr = run_generate("-n", 40, *COMMAND)
    assert code == 1
    assert stderr.splitlines()[-1] == (
        "error: [Errno 27] File too large; finished shards stay, the same command resumes: "
        f"'{tmp_path / names(3)[0]}'"
    )


# Real processes


def command(model_folder, folder, num_images):
    options = ["-m", model_folder, "-o", folder, "-n", num_images, "--backend", "eager", *COMMAND]
    return ["-m", "isic_vq", "generate", *options]


@contextmanager
def launched(arguments, log, **environment):
    """A Python process, gone at the end of the block."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            stdout=file,
            stderr=file,
            env=variables,
            # A shell starts what runs in the background deaf to Ctrl-C, and all that this starts in turn.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_torchrun_makes_the_bytes_of_one_process(model, model_folder, tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port]
    log = tmp_path / "log"
    with launched([*torchrun, *command(model_folder, tmp_path / "two", 120)], log) as process:
        assert process.wait(TIMEOUT) == 0, log.read_text()
    assert {"process 0 of 2: wrote 4 shards", "process 1 of 2: wrote 4 shards"} == set(
        re.findall(r"process \d of \d: wrote \d shards", log.read_text())
    )
    make(model, tmp_path / "one", num_images=120)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    """The files of a set of 3200 images, made without a stop by one process."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    make(model, folder, num_images=3200)
    return contents(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stopped_midway_and_run_again_is_the_uninterrupted_set(
    model, model_folder, uninterrupted, tmp_path, number
):
    folder, num_images = tmp_path / "set", 3200
    shards, logs = names(200), [tmp_path / "log-0", tmp_path / "log-1"]
    start = command(model_folder, folder, num_images)
    with (
        launched(start, logs[0], RANK="0", WORLD_SIZE="2") as survivor,
        launched(start, logs[1], RANK="1", WORLD_SIZE="2") as victim,
    ):
        deadline = time.monotonic() + TIMEOUT
        while not (folder / shards[1]).exists():
            assert victim.poll() is None, logs[1].read_text()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        victim.send_signal(number)
        victim.wait(TIMEOUT)
        assert survivor.wait(TIMEOUT) == 0, logs[0].read_text()
    assert victim.returncode == (130 if number == signal.SIGINT else -number)
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("images-*")}
    made = sum(name in kept for name in shards[1::2])
    assert 0 < made < 100, "it was stopped midway"
    assert sum(name in kept for name in shards[::2]) == 100, "the other process did not need it"
    if number == signal.SIGINT:
        last = logs[1].read_text().splitlines()[-1]
        assert last == f"interrupted: {made} of 100 shards are finished; run the same command to resume"

    assert make(model, folder, num_images=num_images) == (100 - made, 100 + made), "now in one process"
    assert all((folder / name).stat().st_mtime_ns == moment for name, moment in kept.items())
    assert [sample.index for sample in samples(folder)] == list(range(num_images)), "none lost or doubled"
    assert contents(folder) == uninterrupted
