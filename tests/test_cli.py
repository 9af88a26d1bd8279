"""The command line: every command on a tiny run, and every mistake answered by one line that says what to do."""

import errno
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import typer
import yaml
from PIL import Image
from transformers import pipeline

from isic_vq import IsicVQModel, IsicVQPipeline, __version__, cli
from isic_vq.data.code_cache import read_code_cache
from isic_vq.evaluation.report import Report
from isic_vq.hub.pretrained import ModelError
from isic_vq.models.sampling import Sampling
from isic_vq.training.checkpoints import TrainingState
from isic_vq.training.vqvae import VQVAETask

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "numpy", "datasets", "accelerate", "matplotlib", "PIL", "pyarrow", "gradio")


@pytest.fixture
def fails(run):
    """Run a command that must fail with one line and without a traceback; returns the line."""

    def invoke(*arguments):
        code, _, stderr = run(*arguments)
        lines = stderr.strip().splitlines()
        assert code == 1, stderr
        assert lines[-1].startswith("error: "), stderr
        assert sum(line.startswith("error: ") for line in lines) == 1, "said once"
        assert "Traceback" not in stderr
        return lines[-1]

    return invoke


def commands(group=None, name=()):
    """Every command of the tree with its words, groups left out."""
    group = group or typer.main.get_command(cli.app)
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*name, word))
        else:
            yield (*name, word), command


COMMANDS = list(commands())


def pngs(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


# Help


def test_help_of_every_command_loads_nothing_heavy():
    """In a fresh process, since this one has loaded everything."""
    script = f"""
import sys
from isic_vq.cli import main
for command in {[[], *map(list, (name for name, _ in COMMANDS))]}:
    sys.argv = ["isic-vq", *command, "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, command
print("LOADED", [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"
    assert "demo" in done.stdout


def test_help_of_every_command_describes_it_and_shows_an_example(run):
    violations = []
    for name, command in COMMANDS:
        code, text, _ = run(*name, "--help")
        shown = code == 0 and "Example" in text and f"isic-vq {' '.join(name)}" in " ".join(text.split())
        violations += [] if shown and command.help else [" ".join(name)]
    assert violations == []


def test_examples_in_the_help_parse_and_name_files_that_exist():
    violations = []
    for name, command in COMMANDS:
        lines = [line.strip() for line in command.epilog.splitlines()]
        examples = [shlex.split(line)[1:] for line in lines if line.startswith("isic-vq ")]
        violations += [] if examples else [f"{' '.join(name)}: no example"]
        for words in examples:
            if tuple(words[: len(name)]) != name:
                violations.append(f"{' '.join(name)}: an example of another command")
                continue
            try:
                command.make_context(words[0], words[len(name) :])
            except Exception as error:  # an unknown option, a missing argument
                violations.append(f"{' '.join(name)}: {error}")
            files = [word for word in words if word.startswith("examples/")]
            violations += [
                f"{word} is not in the repository" for word in files if not (ROOT / word).is_file()
            ]
    assert violations == []


def test_version_is_the_packages(run):
    assert run("--version")[:2] == (0, f"isic-vq {__version__}\n")


def test_without_arguments_the_help_is_shown(run):
    code, stdout, stderr = run()
    assert "Usage" in stdout + stderr
    assert code in (0, 2)


# Every command on the tiny run


def test_generate_writes_images_a_grid_and_what_they_are(run, tiny_run, tmp_path):
    arguments = [
        "generate",
        "-m",
        tiny_run.prior / "model",
        "-n",
        2,
        "-l",
        "mel",
        "--seed",
        3,
        "-o",
        tmp_path,
    ]
    code, stdout, _ = run(*arguments)
    assert (code, stdout) == (
        0,
        f"wrote 2 images to {tmp_path}; all in one picture: {tmp_path / 'grid.png'}\n",
    )
    assert set(pngs(tmp_path)) == {"image-00000.png", "image-00001.png", "grid.png"}
    image = Image.open(tmp_path / "image-00001.png")
    assert (image.size, image.mode) == ((16, 16), "RGB")
    assert image.text == {
        "Software": f"isic-vq {__version__}",
        "Title": "melanoma",
        "Source": "model",
        "Comment": "synthetic image, seed 3, index 1",
    }


def test_generate_says_which_other_images_a_folder_holds(run, tiny_run, tmp_path):
    def generate(number):
        return run("generate", "-m", tiny_run.prior / "model", "-n", number, "-o", tmp_path)

    assert "other images" not in generate(3)[2]
    assert "other images" not in generate(3)[2], "the same images are replaced"
    (tmp_path / "lesion.JPG").touch()
    code, _, stderr = generate(2)
    assert code == 0
    assert f"warning: {tmp_path} holds 2 other images, such as image-00002.png, which stay" in stderr
    assert (tmp_path / "lesion.JPG").exists()


def test_the_same_seed_writes_the_same_bytes(run, tiny_run, tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ["-m", tiny_run.prior / "model", "-n", 2, "--seed", seed, "-o", tmp_path / folder]
        assert run("generate", *options)[0] == 0
    assert pngs(tmp_path / "a") == pngs(tmp_path / "b")
    images = [pngs(tmp_path / folder)["image-00000.png"] for folder in ("a", "c")]
    assert images[0] != images[1]


def test_one_label_per_image(run, tiny_run, tmp_path):
    options = ["-m", tiny_run.prior / "model", "-n", 2, "-l", "melanoma", "-l", "nv", "-o", tmp_path]
    assert run("generate", *options)[0] == 0
    titles = [Image.open(tmp_path / f"image-0000{index}.png").text["Title"] for index in range(2)]
    assert titles == ["melanoma", "nevus"]


def test_a_grid_says_what_it_shows(run, tiny_run, tmp_path):
    """Under the images, which stay as they are: the caption is ink on white below the last row."""
    model = tiny_run.prior / "model"
    for arguments in (
        ("generate", "-n", 2, "--temperature", 0.5),
        ("reconstruct", tiny_run.images["validation"], "--limit", 2),
    ):
        assert run(*arguments, "-m", model, "-o", tmp_path)[0] == 0
        grid = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
        caption = grid[-24:]
        assert 0.002 < (caption < 128).mean() < 0.3, arguments
        assert (caption[:, 0] == 255).all(), arguments


def test_generate_tells_of_a_model_that_was_hardly_trained(run, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run.prior, tmp_path / "run")
    report = Report.load(folder / "report.json")
    unigram = report.value("bits_per_code_unigram", "validation")
    for share, told in ((0.96, True), (0.94, False)):
        metrics = [
            replace(metric, value=share * unigram, interval=None)
            if metric.text == "bits_per_code" and metric.split == "validation"
            else metric
            for metric in report.metrics
        ]
        Report(report.model, metrics, environment=report.environment).save(folder / "report.json")
        code, _, stderr = run("generate", "-n", 1, "-m", folder / "model", "-o", tmp_path / "out")
        assert code == 0
        assert ("warning: this model was hardly trained" in stderr) == told
        assert (f"{share * unigram:.2f} bits per code" in stderr) == told


def test_a_device_that_is_not_there_is_named(fails, tiny_run, tmp_path):
    model = tiny_run.prior / "model"
    for device in ("warp", "meta"):
        line = fails("generate", "-m", model, "-o", tmp_path / "out", "--device", device)
        assert f"device {device!r} cannot be used" in line
        assert "expected cpu, cuda or mps" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["vqvae", "prior"])
def test_reconstruct_a_folder_with_a_tokenizer_or_a_whole_model(run, tiny_run, tmp_path, stage):
    model, images = getattr(tiny_run, stage) / "model", tiny_run.images["validation"]
    code, stdout, _ = run("reconstruct", images, "-m", model, "-o", tmp_path, "--limit", 5)
    assert code == 0
    assert stdout.startswith("5 images: PSNR ")
    assert set(pngs(tmp_path)) >= {f"image-{index:05d}.png" for index in range(5)} | {"grid.png"}
    assert "image-00005.png" not in pngs(tmp_path)


def test_a_folder_of_which_no_image_can_be_read_is_named(run, tiny_run, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    arguments = ("-m", tiny_run.vqvae / "model", "-o", tmp_path / "out", "--max-corrupt-share", 1)
    code, _, err = run("reconstruct", tmp_path / "images", *arguments)
    assert code == 1
    assert f"{tmp_path / 'images'} holds no readable image" in err


def test_reconstruct_measures_what_the_run_reported(run, tiny_run, tmp_path):
    report = Report.load(tiny_run.vqvae / "report.json")
    stdout = run(
        "reconstruct", tiny_run.images["validation"], "-m", tiny_run.vqvae / "model", "-o", tmp_path
    )[1]
    assert f"PSNR {report.value('psnr'):.2f} dB, SSIM {report.value('ssim'):.4f}" in stdout


def test_encode_writes_the_codes_that_the_library_writes(run, tiny_run, tmp_path):
    data = f"folder:{tiny_run.images['train']}"
    output = tmp_path / "codes.parquet"
    code, stdout, _ = run("encode", tiny_run.vqvae / "model", "--data", data, "-o", output)
    assert (code, stdout) == (0, f"wrote the codes of 16 images in 8 views to {output}\n")
    found, expected = read_code_cache(output), read_code_cache(tiny_run.codes["train"])
    assert np.array_equal(found.codes, expected.codes)
    assert (found.tokenizer_hash, found.source) == (expected.tokenizer_hash, expected.source)


def test_train_both_stages_from_their_recipes(run, tiny_run, tmp_path):
    for stage, said, following in (
        ("vqvae", "validation images; wrote", "encode {} --data SOURCE --part train -o train.parquet"),
        ("prior", "bits per code on validation", "generate -m {}"),
    ):
        output = tmp_path / stage
        options = [tiny_run.configs[stage], f"output_dir={output}", "loop.max_steps=3"]
        code, stdout, _ = run("train", *options)
        assert code == 0
        assert said in stdout
        assert stdout.endswith(f"wrote {output}/model\nnext: isic-vq {following.format(f'{output}/model')}\n")
        assert (output / "model" / "config.json").is_file()
        assert yaml.safe_load((output / "recipe.yaml").read_text())["loop"]["max_steps"] == 3


def test_evaluate_reports_what_training_reported(run, tiny_run, tmp_path, caplog):
    data = f"folder:{tiny_run.images['validation']}"
    output = tmp_path / "report.json"
    options = [tiny_run.prior / "model", "--train-codes", tiny_run.codes["train"], "--out", output]
    code, stdout, _ = run("evaluate", "--data", data, *options)
    assert code == 0
    steps = [line for record in caplog.records if (line := record.getMessage())[1:2] == "/"]
    number = len(list(tiny_run.images["validation"].glob("*.png")))
    assert steps == [
        "1/4 likelihood of training images",
        f"2/4 validation: encode and decode ({number})",
        "3/4 validation: likelihood under every class (8)",
        "4/4 seconds and bytes",
    ]
    found = Report.load(output)
    for stage in ("vqvae", "prior"):
        for metric in Report.load(getattr(tiny_run, stage) / "report.json").metrics:
            assert found.value(metric.text, "validation") == pytest.approx(metric.value, rel=1e-5), (
                metric.text
            )
            assert metric.text in stdout
    source = read_code_cache(tiny_run.codes["validation"]).source
    assert found.tables["validation"]["data"]["diagnoses"] == source.diagnoses


def test_evaluate_tells_training_images_from_others(run, tiny_run, tmp_path):
    train, validation = (f"folder:{tiny_run.images[part]}" for part in ("train", "validation"))
    options = [tiny_run.prior / "model", "--train-data", train, "--out", tmp_path / "report.json"]
    assert run("evaluate", "--data", validation, *options)[0] == 0
    found = Report.load(tmp_path / "report.json")
    assert run("evaluate", "--data", f"train={train}", *options[:1], "--out", tmp_path / "train.json")[0] == 0
    whole = Report.load(tmp_path / "train.json")  # there are fewer training images than a subset would have
    for name in ("psnr", "ssim"):
        assert found.value(name, "train") == pytest.approx(whole.value(name, "train"), rel=1e-6)
        assert found.value(name, "train") != found.value(name, "validation")
    assert found.value("psnr_batch_statistics", "validation") != found.value("psnr", "validation")


def test_figures_of_a_run_are_drawn(run, tiny_run, tmp_path):
    for stage in ("vqvae", "prior"):
        shutil.copytree(getattr(tiny_run, stage), tmp_path / stage)
    code, stdout, _ = run("figures", tmp_path)
    assert code == 0
    written = {Path(line).name for line in stdout.split()}
    assert {
        "vqvae_epoch_loss.png",
        "prior_batch_loss.csv",
        "codebook_usage.png",
        "generated_images.png",
    } <= written
    assert all(Path(line).is_file() for line in stdout.split())


def test_info_describes_the_model(run, tiny_run):
    code, stdout, _ = run("info", tiny_run.prior / "model")
    assert code == 0
    assert len(stdout.splitlines()) == 8
    assert stdout.startswith(f"model      model, isic-vq {__version__}: ")
    assert "16 px -> 4x4 codes of 8," in stdout
    assert "prior      pixelcnn, " in stdout
    assert "classes    0 melanoma, 1 nevus" in stdout
    assert "trained on 16 images of folder:train (CC0-1.0)\n" in stdout
    assert "weights not recorded" in stdout, "it is none of the config's of a run"
    report = Report.load(tiny_run.prior / "report.json")
    assert f"measured   {report.value('bits_per_code', 'validation'):.2f} bits per code\n" in stdout
    code, stdout, _ = run("info", tiny_run.prior / "model", "--all")
    assert "  bits_per_code_unigram " in stdout
    for stage in ("vqvae", "prior"):
        assert f"{stage} trained on 16 images of folder:train, by licence: CC0-1.0 16\n" in stdout


def test_export_evaluate_card_makes_a_repository(run, tiny_run, tmp_path):
    folder, data = (
        tmp_path / "my-model",
        f"folder:{shutil.copytree(tiny_run.images['validation'], tmp_path / 'clinic_b')}",
    )
    codes = ["--train-codes", tiny_run.codes["train"]]
    report, push = folder / "reports" / "evaluation.json", f"next: isic-vq push {folder} USER/my-model\n"
    code, stdout, stderr = run("export", tiny_run.prior / "model", folder, *codes)
    assert code == 0, stderr
    assert stdout.endswith(f"next: isic-vq evaluate {folder} --data SOURCE -o {report}\n")
    code, stdout, stderr = run("evaluate", folder, "--data", data, *codes, "-o", report)
    assert code == 0, stderr
    assert stdout.endswith(f"wrote {report.with_suffix('.html')}\nnext: isic-vq card {folder}\n")
    measured = {
        (metric.split, metric.dataset) for metric in Report.load(report).metrics if metric.name == "psnr"
    }
    assert measured == {("clinic_b", "folder:clinic_b")}
    code, stdout, stderr = run("card", folder)
    assert code == 0, stderr
    assert stdout == f"wrote {folder / 'README.md'}; {push}"
    card = (folder / "README.md").read_text()
    assert "| metric | clinic_b (n = " in card
    assert "\n      split: clinic_b\n" in card
    code, stdout, _ = run("card", folder, "--check")
    assert code == 0
    assert stdout.endswith(push)
    stdout = run("info", folder)[1]
    assert "licence    weights cc0-1.0" in stdout
    assert "measured   PSNR " in stdout, "info shows the reports of a repository"
    assert " s per image in batches of 16\n" in stdout
    private = str(tiny_run.prior.parent).encode()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path.name for path in files if private in path.read_bytes()] == []


def test_every_way_draws_as_the_export_was_told(run, tiny_run, tmp_path):
    folder, labels = tmp_path / "hot", ["--label", "nevus"]
    options = ["--temperature", 3, "--guidance-scale", 2]
    codes = ["--train-codes", tiny_run.codes["train"]]
    assert run("export", tiny_run.prior / "model", folder, *codes, *options)[0] == 0
    model = IsicVQModel.from_pretrained(folder)
    assert model.default_sampling == Sampling(temperature=3, guidance_scale=2)

    def pixels(where, *more):
        assert run("generate", "-m", where, "-n", 4, *labels, *more, "-o", tmp_path / "out")[0] == 0
        return [path.read_bytes() for path in sorted((tmp_path / "out").glob("image*.png"))]

    plain, hot = tiny_run.prior / "model", pixels(folder)
    assert len(hot) == 4
    assert [Image.open(io.BytesIO(image)).tobytes() for image in hot] == [
        Image.open(io.BytesIO(image)).tobytes() for image in pixels(plain, *options)
    ]
    assert hot != pixels(folder, "--temperature", 1), "what is given replaces the checkpoint's"
    drawn = model.generate(4, "nevus", seed=0).codes
    pipe = IsicVQPipeline.from_pretrained(folder)
    assert torch.equal(drawn, pipe("nevus", num_images=4, seed=0, output_type="latent").images)
    task = pipeline("unconditional-image-generation", model=model)
    assert task("nevus", num_images=4, seed=0, return_codes=True)["codes"].tolist() == drawn.tolist()
    assert not torch.equal(drawn, model.generate(4, "nevus", seed=0, sampling=Sampling()).codes)
    assert (
        run("generate", "-m", folder, "-n", 4, *labels, "--shards", "parquet", "-o", tmp_path / "set")[0] == 0
    )
    (shard,) = (tmp_path / "set").glob("*.parquet")
    assert parquet.read_table(shard)["codes"].to_pylist() == drawn.flatten(1).tolist()
    assert "temperature 3" in Image.open(folder / "previews" / "nevus.png").text["Comment"]


# Errors


def test_debug_shows_the_traceback(run, tmp_path):
    with pytest.raises(ModelError, match="holds no config.json"):
        run("--debug", "generate", "-m", tmp_path)


def test_debug_of_one_call_does_not_stay_on(run, fails, tmp_path):
    with pytest.raises(ModelError):
        run("--debug", "generate", "-m", tmp_path)
    assert "holds no config.json" in fails("generate", "-m", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-n", 0], "num_images"),
        (["-n", -3], "num_images"),
        (["--batch-size", 0], "batch_size"),
        (
            ["-l", "mellanoma"],
            "label 'mellanoma' is not a class of this model. Did you mean melanoma? Classes: 0 = melanoma",
        ),
        (["-l", "99"], "label '99' is not a class id of this model"),
        (["-n", 3, "-l", "nv", "-l", "mel"], "there are 2 labels for 3 images"),
        (["--temperature", 0], "temperature is 0.0: expected more than 0"),
        (["--top-k", 0], "top_k is 0: expected at least 1"),
        (["--top-p", 1.5], "top_p is 1.5: expected a probability"),
        (["--guidance-scale", -1], "guidance_scale is -1.0: expected at least 0"),
        (["--seed", -1], "seed is -1: expected 0 or more"),
    ],
)
def test_generate_refuses_settings_without_a_meaning(fails, tiny_run, tmp_path, options, message):
    output = tmp_path / "samples"
    assert message in fails("generate", "-m", tiny_run.prior / "model", "-o", output, *options)
    assert not output.exists(), "nothing is written before the arguments are checked"


def test_checkpoint_of_another_class_is_refused_by_name(fails, tiny_run):
    line = fails("generate", "-m", tiny_run.vqvae / "model")
    assert "model is a tokenizer: expected a whole model" in line


def test_damaged_weights_are_refused_by_name(fails, tiny_run, tmp_path):
    model = shutil.copytree(tiny_run.vqvae / "model", tmp_path / "cut")
    (model / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    assert "cut cannot be read as a tokenizer" in fails("reconstruct", tiny_run.images["train"], "-m", model)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no/such/folder", "no/such/folder is neither a model folder nor a Hub id such as user/isic-vq-128"),
        ("{images}/000.png", "is neither a model folder nor a Hub id"),
        ("{images}", "holds no config.json: expected a model folder, such as a run's model/"),
    ],
)
def test_model_that_is_none_is_named(fails, tiny_run, model, message):
    assert message in fails("generate", "-m", model.format(images=tiny_run.images["train"]))


@pytest.fixture
def reconstruct(tiny_run, tmp_path):
    """Arguments that reconstruct what is appended."""
    return ["reconstruct", "-m", tiny_run.vqvae / "model", "-o", tmp_path / "out"]


def text_called_jpg(path):
    path.write_text("this is no image")


def truncated_jpg(path):
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:900])


def empty_jpg(path):
    path.write_bytes(b"")


def too_small_jpg(path):
    Image.new("RGB", (40, 12)).save(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (text_called_jpg, "expected a complete image that Pillow can decode to RGB"),
        (truncated_jpg, "expected a complete image that Pillow can decode to RGB"),
        (empty_jpg, "expected a complete image that Pillow can decode to RGB"),
        (too_small_jpg, "expected a shorter side of at least 16 px, got 40 x 12 px"),
    ],
)
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_image_that_cannot_be_used_is_named(fails, reconstruct, tmp_path, kind, damage, message):
    folder = tmp_path / "images"
    folder.mkdir()
    damage(folder / "mole.jpg")
    line = fails(*reconstruct, folder / "mole.jpg" if kind == "file" else folder)
    assert message in line
    assert "mole" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("missing.jpg", "Nothing matches parquet:missing.jpg"),
        ("folder:missing", "folder:missing is not a directory"),
        ("{empty}", "No images in the folder 'empty' or below: expected files that end in"),
        ("https://example.org/a.jpg", "unknown scheme 'https'"),
        ("synthetic:none", "is not synthetic:NUM"),
    ],
)
def test_data_that_is_not_there_is_named(fails, reconstruct, tmp_path, data, message):
    (tmp_path / "empty").mkdir()
    assert message in fails(*reconstruct, data.format(empty=tmp_path / "empty"))


def test_image_of_40_megapixels_is_reconstructed(run, reconstruct, tmp_path):
    Image.new("RGB", (8000, 5000), (200, 150, 140)).save(tmp_path / "large.jpg")
    code, stdout, _ = run(*reconstruct, tmp_path / "large.jpg")
    assert (code, stdout[:9]) == (0, "1 images:")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_16_bit_grey_is_scaled_and_not_clipped(run, reconstruct, tmp_path, kind):
    folder = tmp_path / "grey"
    folder.mkdir()
    ramp = np.linspace(0, 65535, 32, dtype=np.uint16)[None, :].repeat(32, axis=0)
    Image.fromarray(ramp).save(folder / "ramp.png")
    assert run(*reconstruct, folder / "ramp.png" if kind == "file" else folder)[0] == 0
    shown = np.asarray(Image.open(tmp_path / "out" / "grid.png"))[:16, :16]
    assert len(np.unique(shown[8, :, 0])) > 12, "a clipped ramp would be white but for a pixel or two"


def test_one_corrupt_image_in_training_is_counted_and_named(run, tiny_run, tmp_path, caplog):
    images = shutil.copytree(tiny_run.images["train"], tmp_path / "images")
    (images / "003.png").write_text("this is no image")
    options = [f"output_dir={tmp_path / 'run'}", f"data.train=folder:{images}", "data.max_corrupt_share=0.1"]
    assert run("train", tiny_run.configs["vqvae"], *options, "loop.max_steps=4")[0] == 0
    named = [
        record.getMessage() for record in caplog.records if "Skipped a corrupt image" in record.getMessage()
    ]
    assert len(named) == 1
    assert "SYNTHETIC_0_0000003" in named[0]


def test_too_many_corrupt_images_stop_a_command(fails, tiny_run, tmp_path):
    images = shutil.copytree(tiny_run.images["train"], tmp_path / "images")
    (images / "003.png").write_text("this is no image")
    output = tmp_path / "codes.parquet"
    line = fails("encode", tiny_run.vqvae / "model", "--data", f"folder:{images}", "-o", output)
    assert "1 of 16 images are corrupt" in line
    assert "SYNTHETIC_0_0000003" in line
    assert not output.exists()


@pytest.mark.parametrize("command", ["encode", "reconstruct", "evaluate"])
def test_corrupt_images_within_the_share_are_skipped_and_counted(run, tiny_run, tmp_path, command):
    images = shutil.copytree(tiny_run.images["train"], tmp_path / "images")
    (images / "003.png").write_text("this is no image")
    data, model, output = f"folder:{images}", tiny_run.prior / "model", tmp_path / "out"
    arguments = {
        "encode": [model, "--data", data, "-o", output],
        "reconstruct": [data, "-m", model, "-o", output],
        "evaluate": [model, "--data", data, "-o", output],
    }[command]
    code, stdout, stderr = run(command, *arguments, "--max-corrupt-share", 0.1)
    assert code == 0, stderr
    assert "15 images" in stdout or "n = 15" in stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["loop.max_step=3"], "unknown recipe key loop.max_step: did you mean loop.max_steps?"),
        (["model.num_code=3"], "unknown recipe key model.num_code: did you mean model.num_codes?"),
        (["loop.max_steps=many"], "loop.max_steps: expected int"),
        (["data.train=*.parquet"], "is not YAML after the =: put the value in quotes"),
        (["data.train=''"], "data.train is not set"),
        (["loop.batch_size=64"], "the training set has 16 images, fewer than one batch of 64"),
        (
            ["loop.accumulation_steps=3"],
            "loop.batch_size is 4: expected a multiple of 3, 3 accumulated parts",
        ),
        (["loop.trackers=[mlflow]"], "trackers has ['mlflow']: expected any of wandb, tensorboard, trackio"),
    ],
)
def test_recipe_that_cannot_run_is_answered_in_one_line(fails, tiny_run, tmp_path, options, message):
    output = f"output_dir={tmp_path / 'run'}"
    assert message in fails("train", tiny_run.configs["vqvae"], output, *options)


def test_the_recipe_names_the_stage(fails, tmp_path):
    assert "is not a file: expected a YAML recipe" in fails("train", tmp_path / "no.yaml")
    recipe, stages = tmp_path / "a.yaml", "expected one of vqvae, prior, decoder, classifier"
    for text, told in (
        ("output_dir: x\n", "no stage is named"),
        ("stage: vqvea\n", "stage is 'vqvea'"),
        ("stage: [vqvae]\n", "stage is ['vqvae']"),
    ):
        recipe.write_text(text)
        assert f"a.yaml: {told}, {stages}" in fails("train", recipe)
    assert f"no stage is named, {stages}" in fails("train", "data.train=synthetic:8:0")
    recipe.write_text("stage: vqvae\n")
    assert "this is a 'vqvae' recipe" in fails("train", recipe, "stage=prior")


def test_finished_run_is_not_overwritten(fails, tiny_run):
    assert "vqvae already holds a run" in fails("train", tiny_run.configs["vqvae"])


def test_code_cache_that_is_none_is_named(fails, tiny_run, tmp_path):
    data = f"folder:{tiny_run.images['validation']}"
    (tmp_path / "codes.parquet").write_text("this is no parquet")
    options = [tiny_run.prior / "model", "--train-codes", tmp_path / "codes.parquet"]
    assert "codes.parquet is not a code cache" in fails("evaluate", "--data", data, *options)


@pytest.mark.parametrize("option", [["--limit", "few"], ["--colour", "red"]])
def test_usage_error_exits_with_2(run, reconstruct, option):
    code, _, stderr = run(*reconstruct, "photo.jpg", *option)
    assert code == 2
    assert option[0] in stderr


# Full disk, interruption


def full_disk(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_while_generating_leaves_whole_files_only(fails, run, tiny_run, tmp_path, monkeypatch):
    options = ["-m", tiny_run.prior / "model", "-n", 2, "-o", tmp_path / "out"]
    assert run("generate", *options)[0] == 0
    before = pngs(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", full_disk)
    assert "No space left on device" in fails("generate", *options, "--seed", 7)
    assert pngs(tmp_path / "out") == before
    assert len(list((tmp_path / "out").iterdir())) == 3, "no leftovers"


def test_full_disk_at_a_checkpoint_names_the_last_one_and_the_way_on(
    run, fails, tiny_run, tmp_path, monkeypatch
):
    save = TrainingState.save

    def full_after_the_first(self, folder):
        if "step-00000002" not in folder.name:
            full_disk()
        save(self, folder)

    options = [tiny_run.configs["vqvae"], f"output_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "save", full_after_the_first)
        line = fails("train", *options)
    assert "checkpoint of step 4 was not written" in line
    assert (
        "the last good one is step-00000002. Free some space and run the same command with --resume" in line
    )
    assert run("train", *options, "--resume")[0] == 0


def test_weights_that_cannot_be_written_are_one_line_too(fails, tiny_run, tmp_path):
    """A limit on file size fails in safetensors' own writer, whose error is neither OSError nor ValueError."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    codes = ["--train-codes", tiny_run.codes["train"]]
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        line = fails("export", tiny_run.prior / "model", tmp_path / "out", *codes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in line
    assert list(tmp_path.iterdir()) == [], "no half-written repository"


def test_interrupted_training_says_where_it_stopped_and_how_to_go_on(run, tiny_run, tmp_path, monkeypatch):
    options = ["train", tiny_run.configs["vqvae"], f"output_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        patch.setattr(
            VQVAETask, "before_step", lambda self, step: step == 1 and signal.raise_signal(signal.SIGINT)
        )
        code, _, stderr = run(*options)
    assert code == 130, "the shell's code for Ctrl-C"
    last = stderr.strip().splitlines()[-1]
    assert last == (
        "interrupted: stopped at step 2; a checkpoint was saved. Continue with the same command and --resume"
    )


def test_other_commands_end_quietly_on_ctrl_c(run, tiny_run, monkeypatch):
    def ctrl_c(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr("isic_vq.hub.describe.load_model", ctrl_c)
    code, _, stderr = run("info", tiny_run.prior / "model")
    assert (code, stderr) == (130, "interrupted\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_a_real_process_keeps_a_checkpoint_that_resumes(run, tiny_run, tmp_path, number):
    metrics = tmp_path / "run" / "metrics.jsonl"
    options = ["train", tiny_run.configs["vqvae"], f"output_dir={tmp_path / 'run'}"]
    options = [*map(str, options), "loop.max_steps=200"]
    command = [sys.executable, "-c", "from isic_vq.cli import main; main()", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no step after five minutes"
        time.sleep(0.02)
    process.send_signal(number)
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 130, stderr
    assert "a checkpoint was saved. Continue with the same command and --resume" in stderr
    assert "Traceback" not in stderr
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob(f"*{stopped_at(stderr):08d}")
    step = json.loads((checkpoint / "progress.json").read_text())["step"]
    assert 2 < step < 200
    code, _, stderr = run(*options[:-1], f"loop.max_steps={step + 2}", "--resume")
    assert code == 0, stderr
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def stopped_at(stderr):
    return int(stderr.partition("stopped at step ")[2].partition(";")[0])


def test_torch_is_left_as_it_was(run, tiny_run, tmp_path):
    """Commands run inside a notebook must not change its global settings."""
    before = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
    assert (
        run("reconstruct", tiny_run.images["train"], "-m", tiny_run.vqvae / "model", "-o", tmp_path)[0] == 0
    )
    assert (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()) == before
