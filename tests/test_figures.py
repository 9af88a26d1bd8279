import csv
import json
import logging
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from isic_vq.evaluation.report import Report
from isic_vq.figures import image_grid, write_figures
from isic_vq.figures.numbers import smooth, smoothing_window
from isic_vq.figures.plots import use_log_scale
from isic_vq.figures.runs import read_metrics

VQVAE_FIGURES = {"vqvae_batch_loss", "vqvae_epoch_loss", "codebook_usage", "reconstructions"}
PRIOR_FIGURES = {"prior_batch_loss", "prior_epoch_loss", "generated_images"}


def batch(step, loss, **more):
    return {
        "kind": "batch",
        "step": step,
        "epoch": 1,
        "loss": loss,
        "lr": 1e-3,
        "images_per_second": 9.5,
    } | more


def epoch(step, number, train, validation, **more):
    losses = {"train/loss": train, "validation/loss": validation}
    return {"kind": "epoch", "step": step, "epoch": number} | losses | more


def write_log(folder, records, stage="vqvae"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(f"stage: {stage}\nseed: 0\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_report(folder, **tables):
    Report(model={}, metrics=[], tables=tables).save(folder / "report.json")


def write_arrays(folder, name, **tensors):
    (folder / "arrays").mkdir(exist_ok=True)
    save_file(tensors, folder / "arrays" / f"{name}.safetensors")


def random_images(number, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (number, size, size, 3), dtype=np.uint8)


def make_vqvae(folder):
    parts = [
        {"train/l1_loss": 0.4 / e, "validation/l1_loss": 0.5 / e, "validation/perplexity": 3.0}
        for e in (1, 2)
    ]
    records = [batch(step, 1.0 / step) for step in range(1, 5)]
    write_log(folder, [*records, epoch(2, 1, 0.75, 0.8, **parts[0]), epoch(4, 2, 0.3, 0.35, **parts[1])])
    write_report(folder, codebook_counts=[4, 2, 0, 2])
    originals = np.full((3, 16, 16, 3), 100, np.uint8)
    write_arrays(folder, "reconstructions", originals=originals, reconstructions=originals + np.uint8(51))
    return folder


def make_prior(folder):
    write_log(folder, [batch(1, math.log(8)), epoch(1, 1, math.log(4), math.log(16))], stage="prior")
    write_report(folder, sample_labels=["melanoma", "squamous cell carcinoma", "unknown"])
    write_arrays(folder, "samples", images=random_images(3), labels=np.array([0, 7, 8]))
    return folder


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_vqvae_run_gets_every_figure_with_its_numbers(tmp_path):
    run = make_vqvae(tmp_path / "run")
    paths = write_figures(run)
    assert {path.stem for path in paths} == VQVAE_FIGURES
    assert all(path.parent == run / "figures" and path.stat().st_size > 0 for path in paths)
    assert sorted((run / "figures").iterdir()) == sorted(paths), "no temporary file may stay"
    for name in VQVAE_FIGURES:
        assert sorted(path.suffix for path in paths if path.stem == name)[1] == ".png"


def open_picture(path):
    with Image.open(path) as picture:
        return picture.convert("RGB")


def test_every_picture_decodes_at_its_expected_size(tmp_path):
    make_vqvae(tmp_path / "vqvae")
    make_prior(tmp_path / "prior")
    pictures = {path.stem: open_picture(path) for path in write_figures(tmp_path) if path.suffix == ".png"}
    assert all(len(np.unique(np.asarray(picture))) > 10 for picture in pictures.values()), (
        "something is drawn"
    )
    sizes = {name: picture.size for name, picture in pictures.items()}
    assert sizes.pop("generated_images")[0] == 480
    one_panel, two_panels = (1200, 675), (1650, 675)
    assert sizes == {
        "vqvae_batch_loss": one_panel,
        "vqvae_epoch_loss": two_panels,
        "codebook_usage": two_panels,
        "reconstructions": (480, 48 + 2 * 96 + 3 * 2 + 16),
        "prior_batch_loss": one_panel,
        "prior_epoch_loss": one_panel,
    }


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = make_vqvae(tmp_path)
    first = {path: path.read_bytes() for path in write_figures(run)}
    assert {path: path.read_bytes() for path in write_figures(run)} == first


def test_codebook_numbers_of_four_codes_by_hand(tmp_path):
    write_figures(make_vqvae(tmp_path))
    numbers = json.loads((tmp_path / "figures" / "codebook_usage.json").read_text())
    # p = 1/2, 1/4, 0, 1/4: entropy 1/2 * 1 + 2 * 1/4 * 2 = 1.5 bits, perplexity 2 ** 1.5
    assert numbers.pop("perplexity") == pytest.approx(2**1.5, rel=1e-12)
    assert numbers == {
        "num_codes": 4,
        "num_tokens": 8,
        "num_used": 3,
        "usage_percent": 75.0,
        "counts": [4, 2, 0, 2],
    }


@pytest.mark.parametrize("counts", [[], [0, 0], [1, -1, 3], [1.5, 2], ["1"]])
def test_counts_that_count_nothing_are_refused(tmp_path, counts):
    write_report(make_vqvae(tmp_path), codebook_counts=counts)
    with pytest.raises(ValueError, match="codebook_counts must be counts"):
        write_figures(tmp_path)


def test_epoch_numbers_are_the_logged_ones(tmp_path):
    write_figures(make_vqvae(tmp_path))
    rows = read_csv(tmp_path / "figures" / "vqvae_epoch_loss.csv")
    assert list(rows[0]) == [
        "step",
        "epoch",
        "train/loss",
        "validation/loss",
        "train/l1_loss",
        "validation/l1_loss",
    ]
    assert [[float(cell) for cell in row.values()] for row in rows] == [
        [2, 1, 0.75, 0.8, 0.4, 0.5],
        [4, 2, 0.3, 0.35, 0.2, 0.25],
    ]


def test_batch_numbers_hold_the_loss_and_its_moving_mean(tmp_path):
    losses = [float(step % 7) for step in range(1, 301)]
    write_figures(write_log(tmp_path, [batch(step, loss) for step, loss in enumerate(losses, start=1)]))
    rows = read_csv(tmp_path / "figures" / "vqvae_batch_loss.csv")
    assert [float(row["loss"]) for row in rows] == losses
    for index, row in enumerate(rows):  # 300 batches are averaged 7 at a time
        around = losses[max(0, index - 3) : index + 4]
        assert float(row["smoothed_loss"]) == pytest.approx(sum(around) / len(around), abs=1e-9)


def test_the_loss_of_a_prior_is_shown_in_bits_per_code(tmp_path):
    write_figures(make_prior(tmp_path))
    (row,) = read_csv(tmp_path / "figures" / "prior_epoch_loss.csv")
    assert float(row["train/loss"]) == pytest.approx(2.0)
    assert float(row["validation/loss"]) == pytest.approx(4.0)
    (row,) = read_csv(tmp_path / "figures" / "prior_batch_loss.csv")
    assert float(row["loss"]) == pytest.approx(3.0)


def test_reconstruction_numbers_by_hand(tmp_path):
    write_figures(make_vqvae(tmp_path))
    rows = read_csv(tmp_path / "figures" / "reconstructions.csv")
    assert [row["image"] for row in rows] == ["0", "1", "2"]
    for row in rows:  # off by 51 of 255 everywhere: error 0.2, PSNR 10 log10(1 / 0.04)
        assert float(row["mean_absolute_error"]) == pytest.approx(0.2)
        assert float(row["psnr_db"]) == pytest.approx(10 * math.log10(25))


def test_the_reconstructions_show_the_original_above(tmp_path):
    write_figures(make_vqvae(tmp_path))
    picture = np.asarray(open_picture(tmp_path / "figures" / "reconstructions.png"))
    left, top = 140 + 2, 48 + 2
    assert (picture[top : top + 96, left : left + 96] == 100).all()
    assert (picture[top + 98 : top + 194, left : left + 96] == 151).all()
    assert (picture[top + 96 : top + 98, left : left + 96] == 255).all()


def test_generated_images_keep_their_pixels_and_names(tmp_path):
    write_figures(make_prior(tmp_path))
    rows = read_csv(tmp_path / "figures" / "generated_images.csv")
    assert [(row["label"], row["name"]) for row in rows] == [
        ("0", "melanoma"),
        ("7", "squamous cell carcinoma"),
        ("8", "unknown"),
    ]
    picture = np.asarray(open_picture(tmp_path / "figures" / "generated_images.png"))
    enlarged = random_images(3)[0].repeat(6, axis=0).repeat(6, axis=1)
    found = picture[48 + 6 : 48 + 6 + 96, 16 + 6 : 16 + 6 + 96]
    np.testing.assert_array_equal(found, enlarged)


def test_reconstructions_stay_in_the_run_whatever_the_output_folder(tmp_path):
    run = make_vqvae(tmp_path / "run")
    paths = write_figures(run, tmp_path / "published")
    outside = {path.stem for path in (tmp_path / "published").iterdir()}
    assert outside == VQVAE_FIGURES - {"reconstructions"}
    assert {path.stem for path in (run / "figures").iterdir()} == {"reconstructions"}
    assert len(paths) == 2 * len(VQVAE_FIGURES)


def test_a_folder_of_runs_gets_one_folder_of_figures(tmp_path):
    make_vqvae(tmp_path / "quickstart" / "vqvae")
    make_prior(tmp_path / "quickstart" / "prior")
    paths = write_figures(tmp_path / "quickstart")
    assert {path.parent for path in paths} == {tmp_path / "quickstart" / "figures"}
    assert {path.stem for path in paths} == VQVAE_FIGURES | PRIOR_FIGURES


def test_runs_of_one_stage_do_not_overwrite_each_other(tmp_path):
    for name in ("k128", "k512"):
        make_vqvae(tmp_path / "sweep" / name)
    make_prior(tmp_path / "prior")
    paths = write_figures(tmp_path)
    figures = tmp_path / "figures"
    assert {path.parent for path in paths} == {
        figures,
        figures / "sweep" / "k128",
        figures / "sweep" / "k512",
    }
    assert len(set(paths)) == len(paths)


def test_of_a_repeated_step_the_later_line_holds(tmp_path):
    lines = [
        batch(1, 1.0),
        batch(2, 2.0),
        epoch(2, 1, 9.0, 9.0),
        batch(2, 0.5),
        epoch(2, 1, 0.7, 0.8),
        batch(3, 0.4),
    ]
    found = read_metrics(write_log(tmp_path, lines) / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in found["batch"]] == [(1, 1.0), (2, 0.5), (3, 0.4)]
    assert [record["train/loss"] for record in found["epoch"]] == [0.7]


@pytest.mark.parametrize("half", [b'{"kind": "batch", "st', b'{"kind": "ba\xc3', b"\x00\x00\x00\n"])
def test_a_half_written_last_line_is_skipped_and_reported(tmp_path, caplog, half):
    path = write_log(tmp_path, [batch(1, 1.0), batch(2, 0.5)]) / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + half)
    with caplog.at_level(logging.WARNING):
        found = read_metrics(path)
    assert [record["step"] for record in found["batch"]] == [1, 2]
    assert "skipped line 3" in caplog.text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "bat', "line 2 is not JSON"),
        ("", "line 2 is not JSON"),
        ("[1]", "line 2 must be a JSON object with a 'kind'"),
        ('{"step": 1}', "line 2 must be a JSON object with a 'kind'"),
        ('{"kind": "batch", "step": 1.5, "epoch": 1}', "line 2: 'step' must be an integer, got 1.5"),
        ('{"kind": "epoch", "step": 1}', "line 2: 'epoch' must be an integer, got None"),
        ('{"kind": "batch", "step": 1, "epoch": 1, "loss": "x"}', "line 2: 'loss' must be a number, got 'x'"),
        (
            '{"kind": "epoch", "step": 1, "epoch": 1, "train/l1_loss": null}',
            "line 2: 'train/l1_loss' must be a number",
        ),
    ],
)
def test_a_bad_line_elsewhere_is_an_error_with_its_place(tmp_path, line, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([json.dumps(batch(1, 1.0)), line, json.dumps(batch(3, 1.0)), ""]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, " + message):
        read_metrics(path)


def test_records_of_another_kind_are_reported(tmp_path, caplog):
    path = write_log(tmp_path, [batch(1, 1.0), {"kind": "note", "text": "x"}]) / "metrics.jsonl"
    assert len(read_metrics(path)["batch"]) == 1
    assert "no figure shows these records: {'note': 1}" in caplog.text


def test_missing_parts_are_reported_and_the_rest_is_drawn(tmp_path, caplog):
    run = write_log(tmp_path, [batch(1, 1.0), batch(2, 0.5)])
    paths = write_figures(run)
    assert {path.stem for path in paths} == {"vqvae_batch_loss"}
    for name, reason in {
        "epoch_loss": "has no epoch record with 'train/loss'",
        "codebook_usage": "report.json is missing: evaluate the run first",
        "reconstructions": "reconstructions.safetensors is missing: evaluate the run first",
    }.items():
        assert any(name in line and reason in line for line in caplog.messages), name


def test_losses_that_are_not_finite_are_reported(tmp_path, caplog):
    write_figures(write_log(tmp_path, [batch(1, 1.0), batch(2, math.nan), batch(3, 3.0)]))
    assert "1 of 3 batch losses are missing or not finite" in caplog.text
    rows = read_csv(tmp_path / "figures" / "vqvae_batch_loss.csv")
    assert [row["loss"] for row in rows] == ["1.0", "", "3.0"]


def test_an_epoch_without_validation_has_an_empty_cell(tmp_path):
    second = epoch(2, 2, 0.5, 0.6)
    del second["validation/loss"]
    write_figures(write_log(tmp_path, [epoch(1, 1, 1.0, 1.1), second]))
    rows = read_csv(tmp_path / "figures" / "vqvae_epoch_loss.csv")
    assert [row["validation/loss"] for row in rows] == ["1.1", ""]


def test_a_run_with_nothing_to_draw_is_an_error_before_anything_is_written(tmp_path):
    make_prior(tmp_path / "prior")
    write_log(tmp_path / "vqvae", [])
    with pytest.raises(ValueError, match="vqvae has nothing to draw; train or evaluate it first"):
        write_figures(tmp_path)
    assert not (tmp_path / "figures").exists()


def test_a_folder_without_a_run_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl in .* give the folder"):
        write_figures(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder; give the folder"):
        write_figures(tmp_path / "absent")


@pytest.mark.parametrize("recipe", [None, "seed: 1\n", "stage: gan\n", "- 1\n"])
def test_a_run_without_a_known_stage_is_an_error(tmp_path, recipe):
    path = write_log(tmp_path, [batch(1, 1.0)]) / "recipe.yaml"
    path.unlink()
    if recipe:
        path.write_text(recipe)
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        write_figures(tmp_path)


def test_broken_arrays_name_their_file(tmp_path):
    path = make_vqvae(tmp_path) / "arrays" / "reconstructions.safetensors"
    save_file({"originals": random_images(1)}, path)
    with pytest.raises(
        ValueError, match=r"reconstructions\.safetensors must hold .*missing \['reconstructions'\]"
    ):
        write_figures(tmp_path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"reconstructions\.safetensors cannot be read"):
        write_figures(tmp_path)


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    make_vqvae(tmp_path / "vqvae")
    write_arrays(
        tmp_path / "vqvae", "reconstructions", originals=random_images(2), reconstructions=random_images(3)
    )
    with pytest.raises(ValueError, match="must have one shape"):
        write_figures(tmp_path / "vqvae")
    write_report(make_prior(tmp_path / "prior"), sample_labels=["melanoma"])
    with pytest.raises(ValueError, match="got 3 images, 3 labels and 1 names"):
        write_figures(tmp_path / "prior")


def test_more_images_than_fit_are_counted_but_not_drawn(tmp_path):
    run = make_vqvae(tmp_path)
    write_arrays(
        run, "reconstructions", originals=random_images(70), reconstructions=random_images(70, seed=1)
    )
    write_figures(run)
    assert len(read_csv(run / "figures" / "reconstructions.csv")) == 70
    rows, gaps = 8 * (2 * 96 + 6), 7 * 24
    assert open_picture(run / "figures" / "reconstructions.png").height == 48 + rows + gaps + 16


def test_a_failing_replace_leaves_the_old_figures_alone(tmp_path, monkeypatch):
    run = make_vqvae(tmp_path)
    old = {path: path.read_bytes() for path in write_figures(run)}
    write_report(run, codebook_counts=[1, 1])
    write_log(run, [batch(1, 5.0)])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_figures(run)
    assert {path: path.read_bytes() for path in (run / "figures").iterdir()} == old


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    make_vqvae(tmp_path)
    code = (
        "import sys, pathlib\n"
        "from matplotlib import rcParams\n"
        "from isic_vq.figures import write_figures\n"
        "style = lambda: {key: rcParams[key] for key in rcParams if key != 'backend'}  # that one imports pyplot\n"
        "before = style(); write_figures(pathlib.Path(sys.argv[1])); assert style() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path)], check=True)


def test_without_matplotlib_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'isic-vq\[figures\]'"):
        write_figures(make_vqvae(tmp_path))


def test_smoothing_a_straight_line_does_not_lag():
    line = np.arange(50.0)
    np.testing.assert_allclose(smooth(line, 5)[2:-2], line[2:-2])
    np.testing.assert_array_equal(smooth(line, 1), line)


def test_smoothing_leaves_out_what_is_not_finite():
    values = np.array([1.0, math.nan, 5.0, math.inf, 3.0])
    np.testing.assert_allclose(smooth(values, 3), [1.0, math.nan, 5.0, math.nan, 3.0])
    np.testing.assert_allclose(smooth(values, 5), [3.0, math.nan, 3.0, math.nan, 4.0])


def test_the_smoothing_window_is_odd_and_a_fiftieth():
    assert [smoothing_window(number) for number in (1, 99, 100, 1000, 5000)] == [1, 1, 3, 21, 101]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 31], True),
        ([1, 30], False),
        ([0, 1, 31], True),
        ([-1, 1, 31], False),
        ([0, 0], False),
        ([], False),
    ],
)
def test_an_axis_is_logarithmic_only_where_values_span_much(values, expected):
    assert use_log_scale(np.array(values, dtype=np.float64)) is expected


def test_every_split_and_every_part_that_is_off_at_first_is_drawn(tmp_path):
    parts = [
        {f"{split}/{part}_loss": value for split in ("train", "averaged") for part in ("l1", "commitment")}
        for value in (0.0, 1e-3, 1e-1)
    ]
    records = [epoch(e, e, 1.0, 1.1, **{"averaged/loss": 0.9} | part) for e, part in enumerate(parts)]
    write_figures(write_log(tmp_path, records))
    header = list(read_csv(tmp_path / "figures" / "vqvae_epoch_loss.csv")[0])
    assert header[2:5] == ["train/loss", "validation/loss", "averaged/loss"]
    assert set(header[5:]) == set(parts[0])


@pytest.mark.parametrize(("columns", "padding", "rows"), [(3, 2, 2), (2, 0, 3), (5, 7, 1)])
def test_the_grid_puts_every_pixel_where_it_says(columns, padding, rows):
    images = random_images(5)[:, :, :12]
    height, width = 16, 12
    grid = np.asarray(image_grid(images, columns=columns, padding=padding))
    expected = np.full(
        (padding + rows * (height + padding), padding + columns * (width + padding), 3), 255, np.uint8
    )
    for index, image in enumerate(images):
        y, x = padding + index // columns * (height + padding), padding + index % columns * (width + padding)
        expected[y : y + height, x : x + width] = image
    np.testing.assert_array_equal(grid, expected)


@pytest.mark.parametrize(("number", "columns"), [(1, 1), (4, 2), (5, 3), (10, 4), (16, 4)])
def test_the_grid_is_as_square_as_possible(number, columns):
    assert image_grid(random_images(number), padding=0).width == 16 * columns


def test_the_grid_is_no_wider_than_its_images():
    assert image_grid(random_images(2), columns=8, padding=0).size == (32, 16)


def test_labels_stand_under_their_images():
    images = np.zeros((3, 100, 100, 3), np.uint8)
    grid = np.asarray(
        image_grid(images, columns=3, padding=2, labels=["melanoma", "", "squamous cell carcinoma"])
    )
    assert grid.shape[1] == 2 + 3 * 102
    assert (grid[2:102, 2:102] == 0).all()
    strips = [grid[104:, 2 + i * 102 : 102 + i * 102] for i in range(3)]
    assert (strips[0] < 128).any()
    assert (strips[1] == 255).all()
    text_rows = [np.flatnonzero((strip < 128).any(axis=(1, 2))) for strip in strips]
    assert text_rows[2].max() > text_rows[0].max() + 5, "the long name must wrap into a second line"


def test_a_cell_is_wide_enough_for_the_longest_word():
    images = np.zeros((2, 16, 16, 3), np.uint8)
    grid = np.asarray(image_grid(images, columns=2, padding=2, labels=["dermatofibroma", "nevus"]))
    cell = (grid.shape[1] - 2) // 2 - 2
    assert cell > 60
    left = 2 + (cell - 16) // 2
    assert (grid[2:18, left : left + 16] == 0).all()
    assert (grid[2:18, 2:left] == 255).all()
    assert (grid[:, :2] == 255).all(), "text must not touch the border"


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (random_images(2).astype(np.float32), {}, "images must be uint8 of shape .* got float32"),
        (random_images(2)[0], {}, r"got uint8 of shape \(16, 16, 3\)"),
        (random_images(2).transpose(0, 3, 1, 2), {}, r"got uint8 of shape \(2, 3, 16, 16\)"),
        (random_images(2)[:0], {}, "at least one image"),
        (random_images(2), {"columns": 0}, "columns must be at least 1"),
        (random_images(2), {"padding": -1}, "padding at least 0"),
        (random_images(2), {"labels": ["a"]}, "labels must be one per image, got 1 for 2 images"),
    ],
)
def test_a_grid_that_cannot_be_made_is_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, **options)
