"""How images reach the steps of a run: none twice in an epoch, none left out but the dropped ones, exact resumes.

What single processes are fed is tested here by the feeds themselves; real groups of processes, started by torchrun
and killed, run `feeding_worker.py`.
"""

import io
import itertools
import json
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
from launching import TIMEOUT, launched, run, torchrun, wait_for_step
from PIL import Image
from run_folder import digests, records, untimed

from isic_vq.data import sources
from isic_vq.data.order import epoch_order
from isic_vq.data.prepare import Preparation, prepare
from isic_vq.data.schema import DataError
from isic_vq.data.sources import find_source
from isic_vq.data.streaming import StreamedImages
from isic_vq.models.image_processing_isic_vq import IsicVQImageProcessor
from isic_vq.training.feed import RowFeed, StreamFeed
from isic_vq.training.image_task import ImageTask, open_images
from isic_vq.training.load import load_recipe
from isic_vq.training.loop import InterruptedTraining
from isic_vq.training.processes import Processes, TrainingError
from isic_vq.training.recipe import LoopRecipe, VQVAERecipe
from isic_vq.training.vqvae import VQVAETask, train_vqvae
from stream_only import StreamOnly

WORKER = Path(__file__).with_name("feeding_worker.py")


class Numbered(Processes):
    """A process that believes to be one of several."""

    rank, world, device = 0, 1, torch.device("cpu")

    def __init__(self, rank=0, world=1):
        self.rank, self.world = rank, world


def names(items):
    return {"ids": [item["isic_id"] for item in items], "size": len(items)}


@pytest.fixture(scope="module")
def images():
    return StreamedImages(StreamOnly(), IsicVQImageProcessor(size=8), sum(StreamOnly.sizes), window=5)


def feed_of(images, rank=0, world=1, **loop):
    return StreamFeed(images, names, LoopRecipe(**{"batch_size": 4, **loop}), Numbered(rank, world))


def ids_of(steps):
    return [[batch["ids"] for batch in step] for step in steps]


# A feed by itself


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_stream_gives_whole_shares_and_no_image_twice(images, world, num_workers):
    """What each lane has left over is less than a micro-batch, and what a process has less than a share."""
    size, lanes = 6, max(1, num_workers)
    for epoch in (0, 3):
        for rank in range(world):
            feed = feed_of(
                images,
                rank,
                world,
                batch_size=2 * world * size,
                accumulation_steps=2,
                num_workers=num_workers,
            )
            steps = ids_of(feed.epoch(epoch, 0))
            seen = Counter(itertools.chain.from_iterable(itertools.chain.from_iterable(steps)))
            own = [list(images.lane(0, epoch, rank + world * lane, world * lanes)) for lane in range(lanes)]
            assert set(seen.values()) <= {1}
            assert set(seen) <= {item["isic_id"] for lane in own for item, _ in lane}
            assert {len(batch) for step in steps for batch in step} <= {size}
            assert len(steps) == sum(len(lane) // size for lane in own) // 2


@pytest.mark.parametrize(
    ("num_workers", "accumulation_steps"),
    [(0, 1), (0, 2), pytest.param(2, 1, marks=pytest.mark.slow), pytest.param(3, 2, marks=pytest.mark.slow)],
)
def test_a_stream_goes_on_exactly_from_any_step(images, num_workers, accumulation_steps):
    loop = {"num_workers": num_workers, "accumulation_steps": accumulation_steps}
    whole = ids_of(feed_of(images, **loop).epoch(2, 0))
    assert len(whole) > 5
    for done in range(1, len(whole) + 1, 1 if num_workers == 0 else 3):
        feed = feed_of(images, **loop)
        steps = feed.epoch(2, 0)
        for _ in range(done):
            next(steps)
        for batch in (done - 1, done):  # a step is under way, or done
            resumed = feed_of(images, **loop)
            resumed.restore(json.loads(json.dumps(feed.state(batch))))
            assert ids_of(resumed.epoch(2, batch)) == whole[batch:]
        assert ids_of(resumed.epoch(3, 0)) == ids_of(feed_of(images, **loop).epoch(3, 0))


def test_two_loading_processes_do_not_change_what_a_lane_gives(images):
    here, there = (feed_of(images, num_workers=number) for number in (0, 1))
    assert ids_of(here.epoch(0, 0)) == ids_of(there.epoch(0, 0))


def test_starting_an_epoch_of_a_stream_draws_nothing_from_the_global_generator(images):
    before = torch.get_rng_state()
    next(feed_of(images, num_workers=2).epoch(0, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_of_fewer_parts_than_processes_is_refused(images):
    with pytest.raises(TrainingError, match="streamonly:test has 6 parts .* fewer than the 7 processes"):
        feed_of(images, 0, 7, batch_size=7)


def test_a_stream_is_not_resumed_by_other_loading_processes(images):
    feed = feed_of(images, num_workers=2)
    next(feed.epoch(0, 0))
    with pytest.raises(TrainingError, match="resume it with loop.num_workers=2"):
        feed_of(images, num_workers=3).restore(feed.state(1))


def test_rows_and_streams_do_not_resume_each_other(images):
    stream = feed_of(images)
    next(stream.epoch(0, 0))
    rows = RowFeed(range(40), names, LoopRecipe(batch_size=4), Numbered())
    with pytest.raises(TrainingError, match="was fed by a stream"):
        rows.restore(stream.state(1))
    with pytest.raises(TrainingError, match="was not fed by a stream"):
        stream.restore(rows.state(1))


# A run of one process


@pytest.fixture(scope="module")
def streamed(tiny_run):
    """The tiny recipe fed by a stream, as overrides; a test adds its output_dir."""
    return [
        "data.train=synthetic:40:0",
        f"data.validation=folder:{tiny_run.images['validation']}",
        "data.stream=true",
        "loop.max_steps=14",  # an epoch is ten steps
        "loop.save_every=100",
    ]


@pytest.fixture(scope="module")
def reference(tiny_run, streamed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed") / "run"
    train_vqvae(load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], [*streamed, f"output_dir={folder}"]))
    return folder


def test_a_tokenizer_is_trained_from_a_stream(reference):
    assert [record["step"] for record in records(reference, "batch")] == list(range(1, 15))
    first, second = records(reference, "epoch")
    assert first["train/dropped_images"] == 0
    assert second["train/dropped_images"] == 40 - 4 * 4, "the run ends before the epoch does"
    assert json.loads((reference / "run.json").read_text())["data"]["train"]["num_images"] == 40


@pytest.mark.parametrize("step", [3, 10, 12])
def test_an_interrupted_stream_resumes_to_the_same_bytes(
    tiny_run, streamed, reference, tmp_path, monkeypatch, step
):
    recipe = load_recipe(
        VQVAERecipe, tiny_run.configs["vqvae"], [*streamed, f"output_dir={tmp_path / 'run'}"]
    )
    before_step = VQVAETask.before_step

    def interrupt(self, now):
        before_step(self, now)
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(VQVAETask, "before_step", interrupt)
        with pytest.raises(InterruptedTraining):
            train_vqvae(recipe)
    torch.manual_seed(99)
    train_vqvae(recipe, resume=True)
    for part in ("best", "model", "arrays"):
        assert digests(tmp_path / "run" / part) == digests(reference / part), part
    assert untimed(records(tmp_path / "run")) == untimed(records(reference))


def test_an_epoch_without_a_whole_batch_ends_the_run_with_a_way_out(tiny_run, streamed, tmp_path):
    """Three lanes share 40 images: none has 20."""
    overrides = [*streamed, f"output_dir={tmp_path / 'run'}", "loop.batch_size=20", "loop.num_workers=3"]
    with pytest.raises(TrainingError, match="lower loop.batch_size or loop.num_workers"):
        train_vqvae(load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], overrides))


def test_rows_that_no_step_sees_are_counted(make_trainer):
    trainer = make_trainer(batch_size=4, max_steps=4)
    trainer.train()
    assert [record["train/dropped_images"] for record in records(trainer.run.folder, "epoch")] == [2, 2]


def test_validation_images_that_are_training_images_are_told(tiny_run, caplog):
    same = ["data.train=synthetic:20:0", "data.validation=synthetic:20:0"]
    recipe = load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], same)
    open_images(recipe.data, IsicVQImageProcessor(size=16))
    assert "20 of 20 validation images share an id with training images" in caplog.text


def test_prepared_images_are_read_shard_by_shard(tiny_run, small_prepared):
    """Sixteen of the 24 shards are open at a time; the first 320 rows of an epoch are theirs."""
    recipe = load_recipe(
        VQVAERecipe, tiny_run.configs["vqvae"], [f"data.train={small_prepared}", "loop.seed=3"]
    )
    processor = IsicVQImageProcessor(size=16)
    train_set, validation_set, _ = open_images(recipe.data, processor)
    feed = ImageTask(torch.nn.Linear(1, 1), processor, train_set, validation_set, recipe).feed(
        recipe.loop, Numbered()
    )
    for epoch in (0, 2):
        feed.batches.epoch = epoch
        rows = sum(feed.batches, [])
        assert rows == epoch_order([20] * 24, seed=3, epoch=epoch).tolist()
        assert len({row // 20 for row in rows[:320]}) == 16


@pytest.fixture
def stream_only(monkeypatch):
    """A scheme of a source that can only be streamed."""
    monkeypatch.setitem(sources.SOURCES, "streamonly", lambda target: StreamOnly())


def test_a_source_without_random_access_is_streamed_unasked(tiny_run, stream_only, tmp_path):
    overrides = ["data.train=streamonly:x", "data.validation=streamonly:x", f"output_dir={tmp_path / 'run'}"]
    train_vqvae(load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], overrides))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {metric["n"] for metric in report["metrics"]} == {40}, "validation images are kept in memory"
    assert [record["step"] for record in records(tmp_path / "run", "batch")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "data", [["data.train=streamonly:x"], ["data.train=synthetic:40:0", "data.stream=true"]]
)
def test_a_stream_without_validation_images_is_refused_with_the_ways_out(
    tiny_run, stream_only, tmp_path, data
):
    recipe = load_recipe(VQVAERecipe, None, [*data, f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(DataError, match=r"name data\.validation, or .* isic-vq data prepare"):
        train_vqvae(recipe)


# Several processes


@pytest.fixture(scope="session")
def small_parquet(tmp_path_factory):
    """The URI of 480 images of 16 x 16 pixels in 20 row groups: made and read in no time."""
    path, rng = tmp_path_factory.mktemp("parquet") / "noise.parquet", np.random.default_rng(0)
    images = []
    for pixels in rng.integers(256, size=(480, 16, 16, 3), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    names = [f"NOISE_{index:03d}" for index in range(480)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "isic_id": names}), path, row_group_size=24)
    return f"parquet:{path}"


@pytest.fixture(scope="session")
def small_prepared(small_parquet, tmp_path_factory):
    """The URI of the same images, prepared in 24 shards."""
    folder = tmp_path_factory.mktemp("prepared") / "noise"
    prepare(folder, [("train", small_parquet)], Preparation(size=16, rows_per_shard=20))
    return f"prepared:{folder}:train"


def job(folder, kind, uri, validation, batch_size, num_workers, save_every=1000):
    data = [
        f"data.train={uri}",
        f"data.validation={validation}",
        f"data.stream={str(kind == 'stream').lower()}",
    ]
    loop = [
        f"loop.batch_size={batch_size}",
        f"loop.num_workers={num_workers}",
        f"loop.save_every={save_every}",
    ]
    return {"folder": str(folder), "data": [*data, "data.cache=false"], "loop": loop}


def watched(jobs, processes, log):
    code, output = run(torchrun(WORKER, json.dumps(jobs), processes=processes), log)
    assert code == 0, output


def steps_seen(folder, rank):
    """The images of each step that counts: those after a checkpoint were trained on again once it was resumed."""
    steps = []
    for line in (folder / f"seen-{rank}.jsonl").read_text().splitlines():
        record = json.loads(line)
        steps = steps[: record["resumed"]] if isinstance(record, dict) else [*steps, record]
    return steps


def expected_steps(kind, uri, batch_size, world, num_workers):
    """How many steps the first epoch of seed 0 has, from the sizes of the parts that each lane reads."""
    source, lanes, share = find_source(uri), max(1, num_workers), batch_size // world
    if kind == "rows":
        return source.describe().num_images // batch_size
    sizes = np.array([sum(1 for _ in source.read(part)) for part in source.parts()])
    order = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(0,))).permutation(len(sizes))
    whole = [sizes[order[lane :: world * lanes]].sum() // share for lane in range(world * lanes)]
    return int(min(sum(whole[rank::world]) for rank in range(world)))


def assert_epoch_was_fed(folder, uri, batch_size, world, num_steps):
    """Every process took as many steps, of whole shares; no image came twice, and the dropped ones were counted."""
    everything = Counter(row["isic_id"] for row in find_source(uri).metadata())
    steps = [steps_seen(folder, rank) for rank in range(world)]
    assert [len(own) for own in steps] == [num_steps] * world
    assert {len(ids) for own in steps for ids in own} == {batch_size // world}
    seen = Counter(name for own in steps for ids in own for name in ids)
    assert seen <= everything
    (record,) = records(folder, "epoch")
    assert (
        record["train/dropped_images"]
        == (everything - seen).total()
        == everything.total() - num_steps * batch_size
    )


def assert_everything_was_read(folder, uri, world):
    read = [json.loads((folder / f"read-{rank}.json").read_text()) for rank in range(world)]
    assert Counter(sum(read, [])) == Counter(row["isic_id"] for row in find_source(uri).metadata())
    assert all(read)


def assert_processes_are_fed(tmp_path, uris, validation, batch_size, world, workers):
    """One launch of processes that read several sources, for training by random access and as streams, and to measure."""
    runs = [
        (tmp_path / f"{kind}-{number}-{num_workers}", kind, uri, num_workers)
        for number, uri in enumerate(uris)
        for kind in ("rows", "stream")
        for num_workers in workers
    ]
    jobs = [job(folder, kind, uri, validation, batch_size, number) for folder, kind, uri, number in runs]
    reads = [
        {
            "folder": str(tmp_path / f"read-{number}-{stream}-{num_workers}"),
            "uri": uri,
            "stream": stream,
            "num_workers": num_workers,
        }
        for number, uri in enumerate(uris)
        for stream in (False, True)
        for num_workers in workers
    ]
    watched([*jobs, *reads], world, tmp_path / "log")
    for folder, kind, uri, num_workers in runs:
        num_steps = expected_steps(kind, uri, batch_size, world, num_workers)
        assert_epoch_was_fed(folder, uri, batch_size, world, num_steps)
    for read in reads:
        assert_everything_was_read(Path(read["folder"]), read["uri"], world)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_processes_see_each_image_once(small_parquet, small_prepared, tmp_path, world):
    uris = [small_parquet, small_prepared]
    assert_processes_are_fed(tmp_path, uris, "synthetic:4:1", 42, world, (0, 2))


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_see_each_real_image_once(data_dir, tmp_path, world):
    ham = "parquet:${ISIC_VQ_DATA}/ham10000/%s-*.parquet"
    assert_processes_are_fed(tmp_path, [ham % "train"], ham % "validation", 96, world, (0, 2))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_an_epoch_of_killed_processes_goes_on_where_its_checkpoint_stood(small_parquet, tmp_path, kind):
    """Killed twice in the middle of an epoch: what counts is each image once."""
    uri, folder = small_parquet, tmp_path / "run"
    command = torchrun(WORKER, json.dumps([job(folder, kind, uri, "synthetic:4:1", 8, 2, save_every=5)]))
    for turn, step in enumerate((7, 23)):
        with launched(command, tmp_path / f"log-{turn}") as process:
            wait_for_step(folder, step, lambda p=process: p.poll() is None)
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.wait(TIMEOUT)
    code, output = run(command, tmp_path / "log")
    assert code == 0, output
    assert (folder / "seen-0.jsonl").read_text().count("resumed") == 2
    assert_epoch_was_fed(folder, uri, 8, 2, expected_steps(kind, uri, 8, 2, 2))


@pytest.mark.slow
def test_a_streamed_run_of_two_processes_is_interrupted_and_resumed_to_the_same_bytes(
    tiny_run, streamed, small_parquet, tmp_path
):
    def command(folder, *more):
        config = tiny_run.configs["vqvae"]
        loop = ["loop.max_steps=150", "loop.batch_size=8", "loop.num_workers=1"]
        arguments = [*streamed, f"data.train={small_parquet}", *loop, f"output_dir={folder}", *more]
        return torchrun("-m", "isic_vq", "train", config, *arguments)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    code, output = run(command(whole), tmp_path / "log")
    assert code == 0, output
    with launched(command(stopped), tmp_path / "stopped-log") as process:
        wait_for_step(stopped, 13, lambda: process.poll() is None)
        process.send_signal(signal.SIGINT)
        process.wait(TIMEOUT)
    assert "Continue with the same command and --resume" in (tmp_path / "stopped-log").read_text()
    code, output = run(command(stopped, "--resume"), tmp_path / "resumed-log")
    assert code == 0, output
    for part in ("best", "model"):
        assert digests(stopped / part) == digests(whole / part), part
    assert untimed(records(stopped)) == untimed(records(whole))
