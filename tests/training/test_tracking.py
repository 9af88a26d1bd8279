"""What a run tells about itself: the same numbers in metrics.jsonl and in every tracker, and pictures to look at."""

import importlib.util
import json
import struct
import sys
import time

import pytest
from line_task import LineTask, interrupt_at
from PIL import Image
from run_folder import digests, records, scalars

from isic_vq.training.load import load_recipe
from isic_vq.training.loop import InterruptedTraining, TrainingError
from isic_vq.training.prior import train_prior
from isic_vq.training.processes import Processes
from isic_vq.training.recipe import LoopRecipe, PriorRecipe, VQVAERecipe
from isic_vq.training.tracking import MetricLog
from isic_vq.training.vqvae import train_vqvae


def size_of(path):
    with Image.open(path) as picture:
        return picture.size


# metrics.jsonl


@pytest.fixture
def log(tmp_path):
    recipe = LoopRecipe(precision="fp32")
    return MetricLog(tmp_path, "0123abcd", recipe, Processes(recipe, tmp_path), {"stage": "line"})


def test_begin_drops_later_and_half_written_lines(log):
    kept = [{"kind": "batch", "step": 2, "epoch": 0}, {"kind": "epoch", "step": 2, "epoch": 0}]
    late = {"kind": "batch", "step": 3, "epoch": 1}
    lines = [json.dumps(record) + "\n" for record in (*kept, late)]
    log.path.write_text("".join(lines) + '{"kind": "batch", "st')
    assert log.begin(2, 1) == kept
    assert log.path.read_text() == "".join(lines[:2])


def test_begin_drops_an_epoch_that_is_still_to_end(log):
    """A checkpoint of an epoch's last step, saved before its validation, will validate again."""
    log.write("batch", 4, 0, {"loss": 0.5})
    log.write("epoch", 4, 0, {"train/loss": 0.5})
    assert [record["kind"] for record in log.begin(4, 0)] == ["batch"]
    assert [json.loads(line)["kind"] for line in log.path.read_text().splitlines()] == ["batch"]


def test_begin_of_a_run_without_metrics_is_nothing(log):
    assert log.begin(0, 0) == []
    assert not log.path.exists()


def test_records_are_lines_of_json_in_order(log):
    log.write("batch", 1, 0, {"loss": 0.5})
    log.write("epoch", 1, 0, {"train/loss": 0.5})
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"kind": "batch", "step": 1, "epoch": 0, "loss": 0.5},
        {"kind": "epoch", "step": 1, "epoch": 0, "train/loss": 0.5},
    ]
    assert not log.has_trackers, "and no picture is drawn for nobody"


# What every tracker is asked for


def test_tracker_that_is_not_installed_is_refused_rather_than_left_out(make_trainer):
    if importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    with pytest.raises(TrainingError, match=r"\['trackio'\]: pip install 'isic-vq\[trackers\]'"):
        make_trainer(trackers=["trackio"])


def test_pictures_are_not_drawn_without_trackers(make_trainer):
    task = LineTask()
    task.pictures = lambda: pytest.fail("a picture for nobody")
    make_trainer(task=task, max_steps=5).train()


# TensorBoard


def tensorboard_events(folder):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return module.EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def tensorboard_scalars(events):
    return [
        (name, event.step, event.value) for name in events.Tags()["scalars"] for event in events.Scalars(name)
    ]


def killed_and_resumed(make_trainer, **loop):
    """A run whose process is killed at step 8, two after its last checkpoint, and which is then resumed."""

    class Killed(LineTask):
        def before_step(self, step):
            if step == 8:
                raise SystemExit

    with pytest.raises(SystemExit):
        make_trainer(task=Killed(), max_steps=12, **loop).train()
    time.sleep(1.1)  # TensorBoard orders its files by the second they were made in
    resumed = make_trainer(max_steps=12, **loop)
    resumed.resume()
    assert resumed.progress.step == 6, "premise: two steps were told of that no checkpoint holds"
    resumed.train()
    resumed.finish()
    return resumed.run.folder


def test_tensorboard_tells_each_step_of_a_resumed_run_once(make_trainer):
    pytest.importorskip("tensorboard")
    folder = killed_and_resumed(make_trainer, trackers=["tensorboard"], project="mine")
    events = tensorboard_events(folder / "mine")
    told = tensorboard_scalars(events)
    expected = scalars(records(folder))
    assert sorted((name, step) for name, step, _ in told) == sorted(expected)
    assert {(name, step): value for name, step, value in told} == pytest.approx(expected, rel=1e-6)
    assert [event.step for event in events.Images("line")] == [5, 10, 12]
    settings = [path.read_text() for path in (folder / "mine").rglob("hparams.yml")]
    assert len(settings) == 1, "settings are told once, too"
    assert "stage: line" in settings[0]


# wandb, offline


def wandb_records(path):
    """The records of a .wandb file: LevelDB's log format, blocks of 32 KiB with a CRC, length and type per piece."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole, found = path.read_bytes(), 7, b"", []
    assert data[:4] in (b":W&B", b""), "an empty file is being written"
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):
            break  # it is being written
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            found.append(Record.FromString(whole))
            whole = b""
    return found


def wandb_history(path):
    """Every value of a run's history, by name and step."""
    found = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            found |= {(name, row["_step"]): value for name, value in row.items() if name[0] != "_"}
    return found


def offline_runs(folder, number=1):
    """Files of offline runs, once all are there and at their end: another process writes them, also after finish()."""
    deadline = time.monotonic() + 60
    while True:
        paths = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
        ended = [any(r.WhichOneof("record_type") == "exit" for r in wandb_records(path)) for path in paths]
        if sum(ended) == len(paths) == number:
            return paths
        assert time.monotonic() < deadline, f"after a minute, wandb has ended {sum(ended)} of {paths}"
        time.sleep(0.1)


@pytest.fixture
def quiet_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    return pytest.importorskip("wandb")


def test_wandb_is_told_what_metrics_jsonl_holds(make_trainer, quiet_wandb):
    trainer = make_trainer(max_steps=7, trackers=["wandb"], project="mine")
    trainer.train()
    trainer.finish()
    (path,) = offline_runs(trainer.run.folder)
    history = wandb_history(path)
    numbers = {key: value for key, value in history.items() if not key[0].startswith("line/")}
    assert numbers == pytest.approx(scalars(records(trainer.run.folder)))
    pictures = {step: value for (name, step), value in history.items() if name == "line/_type"}
    assert pictures == {5: "images/separated", 7: "images/separated"}
    files = sorted(trainer.run.folder.glob("wandb/**/images/*"))
    assert [size_of(file) for file in files] == [(4, 3)] * 2
    (run,) = (r.run for r in wandb_records(path) if r.WhichOneof("record_type") == "run")
    assert (run.project, run.run_id, run.display_name) == ("mine", "0123abcd", "run-0123abcd")


def test_wandb_without_a_login_is_told_before_the_first_step(
    make_trainer, quiet_wandb, monkeypatch, tmp_path
):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    quiet_wandb.teardown()  # what it read of the environment at this process's first run
    trainer = make_trainer(trackers=["wandb"])
    with pytest.raises(TrainingError, match="log in with wandb login, or set WANDB_MODE=offline"):
        trainer.train()
    assert trainer.progress.step == 0
    quiet_wandb.teardown()


def test_wandb_knows_a_resumed_run_as_the_same_run(make_trainer, quiet_wandb):
    task = LineTask()
    task.before = interrupt_at(3)
    with pytest.raises(InterruptedTraining):
        make_trainer(task=task, max_steps=7, trackers=["wandb"]).train()
    quiet_wandb.finish()  # as the end of the process would
    resumed = make_trainer(max_steps=7, trackers=["wandb"])
    resumed.resume()
    resumed.train()
    resumed.finish()
    first, second = sorted(offline_runs(resumed.run.folder, 2), key=lambda path: path.stat().st_mtime_ns)
    assert first.name == second.name == "run-0123abcd.wandb"
    steps = [{step for name, step in wandb_history(path) if name == "batch/loss"} for path in (first, second)]
    assert steps == [{1, 2, 3, 4}, {5, 6, 7}], "each leg tells its own steps"
    told = wandb_history(first) | wandb_history(second)
    expected = scalars(records(resumed.run.folder))
    assert {key: told[key] for key in expected} == pytest.approx(expected)


# The stages' pictures


def test_tokenizer_shows_reconstructions_and_codebook_use(tiny_run, tmp_path, quiet_wandb):
    run = tmp_path / "run"
    overrides = [f"output_dir={run}", "loop.trackers=[wandb, tensorboard]"]
    train_vqvae(load_recipe(VQVAERecipe, tiny_run.configs["vqvae"], overrides))
    identifier = json.loads((run / "run.json").read_text())["identifier"]
    (path,) = offline_runs(run)
    assert path.name == f"run-{identifier}.wandb"
    for name, size in {
        "reconstructions": (8 * 18 + 2, 2 * (2 * 18 + 2) + 4),
        "codebook": (1650, 675),
    }.items():
        files = list(run.glob(f"wandb/**/images/{name}_*.png"))
        assert [size_of(file) for file in files] == [size, size], "one of each validation"
    events = tensorboard_events(run / "isic-vq")
    assert {name: [e.step for e in events.Images(name)] for name in events.Tags()["images"]} == {
        "reconstructions": [4, 6],
        "codebook": [4, 6],
    }
    told = {(name, step): value for name, step, value in tensorboard_scalars(events)}
    assert told == pytest.approx(scalars(records(run)), rel=1e-6)
    assert digests(run / "best") == digests(tiny_run.vqvae / "best"), "who watches changes nothing"


def test_prior_shows_samples(tiny_run, tmp_path):
    run = tmp_path / "run"
    overrides = [f"output_dir={run}", "loop.trackers=[tensorboard]"]
    train_prior(load_recipe(PriorRecipe, tiny_run.configs["prior"], overrides))
    shown = tensorboard_events(run / "isic-vq").Images("samples")
    assert [event.step for event in shown] == [4, 6]
    assert {(event.width, event.height) for event in shown} == {(4 * 18 + 2, 4 * 18 + 2)}, (
        "4 x 4 images of 16 pixels"
    )
    assert digests(run / "best") == digests(tiny_run.prior / "best"), "who watches changes nothing"


# trackio


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory):
    """Where trackio keeps its data: it reads TRACKIO_DIR once, when it is imported."""
    if "trackio" in sys.modules:
        pytest.skip("trackio was imported before it could be told where to write")
    folder = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder))
        pytest.importorskip("trackio")
        yield folder


def test_trackio_is_told_numbers_and_pictures(make_trainer, trackio_folder):
    import sqlite3

    task = LineTask()
    task.before = interrupt_at(3)
    loop = {"max_steps": 7, "trackers": ["trackio"], "project": "mine"}
    stopped = make_trainer(task=task, **loop)
    with pytest.raises(InterruptedTraining):
        stopped.train()
    stopped.finish()
    resumed = make_trainer(**loop)
    resumed.resume()
    resumed.train()
    resumed.finish()
    with sqlite3.connect(trackio_folder / "mine.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _, _ in rows} == {"run-0123abcd"}, "one run, resumed"
    told = {(name, step): value for _, step, text in rows for name, value in json.loads(text).items()}
    pictures = {key: told.pop(key) for key in list(told) if key[0] == "line"}
    assert told == pytest.approx(scalars(records(resumed.run.folder)))
    assert sorted(pictures) == [("line", 5), ("line", 7)]
    assert {value["_type"] for value in pictures.values()} == {"trackio.image"}
    files = [path for path in trackio_folder.rglob("*.png") if "run-0123abcd" in str(path)]
    assert [size_of(file) for file in files] == [(4, 3)] * 2
