"""Own classes from a folder of images to a pipeline of the Hub's copy, by the commands that a user runs."""

import csv
import json

import pytest
import yaml

from isic_vq import IsicVQModel
from isic_vq.data.synthetic_images import synthetic_image

NAMES = ("psoriasis", "contact eczema", "3", "a/b: Ekzem é", "unconditional", "melanoma")
REPO = "user/own"
LOOP = {"max_steps": 4, "batch_size": 8, "warmup_steps": 1, "average_decay": 0.5, "precision": "fp32"}
VQVAE = {
    "image_size": 16,
    "hidden_sizes": [4, 8],
    "num_residual_blocks": 1,
    "residual_size": 4,
    "num_codes": 8,
    "code_dim": 4,
}
PRIOR = {"hidden_size": 8, "num_layers": 1, "first_kernel_size": 3, "head_size": 8}


@pytest.fixture
def succeed(run):
    """Run a command that must succeed; returns what it printed, logs among it."""

    def invoke(*arguments):
        code, out, err = run(*arguments)
        assert code == 0, err
        return out + err

    return invoke


@pytest.fixture
def images(tmp_path):
    """Ten images of each class, described by a table, in which melanoma is written in two ways."""
    folder = tmp_path / "images"
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file_name", "diagnosis"))
        for index in range(60):
            synthetic_image(index, 0, size=32).save(folder / f"{index:02d}.png")
            name = NAMES[index % 6]
            writer.writerow((f"{index:02d}.png", "mel" if index == 5 else name))
    return folder


@pytest.mark.slow
def test_own_classes_from_a_folder_to_the_hub(run, succeed, images, online_hub, tmp_path, caplog):
    caplog.set_level("INFO", "isic_vq")
    code, _, err = run("data", "summary", f"folder:{images}")
    assert code == 1
    assert all(f"{name!r} (10 images)" in err for name in NAMES[:5])
    assert "'melanoma'" not in err
    recipes = {name: tmp_path / f"{name}.yaml" for name in ("vqvae", "prior", "classifier")}
    data, codes = tmp_path / "data", {part: tmp_path / f"{part}.parquet" for part in ("train", "validation")}
    declared = [option for name in NAMES[:5] for option in ("--classes", name)]
    told = succeed("data", "summary", f"folder:{images}", *declared)
    assert 'labels read as another name: "mel" -> melanoma, 1 image' in told
    succeed(
        "data",
        "prepare",
        data,
        "--data",
        f"folder:{images}",
        "--size",
        32,
        "--validation-share",
        0.3,
        *declared,
    )
    sources = {part: f"prepared:{data}:{part}" for part in codes}
    recipes["vqvae"].write_text(
        yaml.safe_dump(
            {"stage": "vqvae", "data": sources, "loop": LOOP, "model": VQVAE, "codebook_warmup_steps": 2}
        )
    )
    succeed("train", recipes["vqvae"], f"output_dir={tmp_path}/vqvae")
    for part, path in codes.items():
        succeed("encode", tmp_path / "vqvae/model", "--data", sources[part], "-o", path, "--views", 2)
    places = {f"{part}_codes": str(path) for part, path in codes.items()}
    recipes["prior"].write_text(
        yaml.safe_dump(
            {
                "stage": "prior",
                "tokenizer": f"{tmp_path}/vqvae/model",
                **places,
                "loop": LOOP,
                "model": PRIOR,
                "num_samples": 7,
            }
        )
    )
    succeed("train", recipes["prior"], f"output_dir={tmp_path}/prior")
    model = tmp_path / "prior/model"
    assert IsicVQModel.from_pretrained(model).config.class_names == dict(enumerate(NAMES))
    for name in ("3", "MEL", "a/b: ekzem é"):
        succeed(
            "generate", "-n", 1, "-m", model, "-l", name, "--guidance-scale", 2, "-o", tmp_path / "samples"
        )
    code, _, err = run("generate", "-n", 1, "-m", model, "-l", "contact eczem")
    assert "label 'contact eczem' is not a class of this model. Did you mean contact eczema?" in err
    recipes["classifier"].write_text(
        yaml.safe_dump(
            {
                "stage": "classifier", "data": sources, "loop": LOOP, "image_size": 16,
                "model": {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"},
            }
        )
    )  # fmt: skip
    succeed("train", recipes["classifier"], f"output_dir={tmp_path}/classifier")
    report = tmp_path / "report.json"
    out = succeed(
        *(
            "evaluate",
            model,
            "--data",
            f"validation={sources['validation']}",
            "--train-codes",
            codes["train"],
        ),
        *("--features", tmp_path / "classifier/model", "--floor-data", sources["train"], "-o", report),
    )
    assert "agreement[samples" in out
    names = {metric["name"] for metric in json.loads(report.read_text())["metrics"]}
    assert any(name.startswith("psnr[diagnosis=") for name in names) or "psnr" in names
    succeed(
        *("audit", "-m", model, "--train-codes", codes["train"], "--held-out-codes", codes["validation"]),
        *("--samples", 16, "-o", tmp_path / "audit.json", "--pairs", tmp_path / "pairs"),
    )
    succeed("compress", images, tmp_path / "images.ivq", "-m", model, "--label", "3")
    succeed("decompress", tmp_path / "images.ivq", tmp_path / "decoded", "-m", model)
    assert len(list((tmp_path / "decoded").glob("*.png"))) == 60
    succeed("evaluate", model, "--only", "sheets", "--data", f"folder:{images}", "-o", tmp_path / "sheets")
    assert {path.name for path in (tmp_path / "sheets").iterdir()} >= {
        "real-a%2Fb%3A Ekzem é.jpg",
        "real-3.jpg",
    }
    folder = tmp_path / "own"
    succeed("export", model, folder, "--train-codes", codes["train"])
    (folder / "reports").mkdir(exist_ok=True)
    (folder / "reports" / "evaluation.json").write_text(report.read_text())
    succeed("card", folder)
    succeed("card", folder, "--check")
    card = (folder / "README.md").read_text()
    assert "![a/b: Ekzem é](previews/a%252Fb%253A%20Ekzem%20%C3%A9.png)" in card
    assert (folder / "previews" / "class unconditional.png").is_file()
    succeed("push", folder, REPO)
    succeed("pull", REPO, "-o", tmp_path / "pulled")
    assert (tmp_path / "pulled/README.md").read_bytes() == (folder / "README.md").read_bytes()
    from transformers import pipeline

    opened = pipeline("unconditional-image-generation", model=REPO)
    assert opened.model.config.class_names == dict(enumerate(NAMES))
    here = IsicVQModel.from_pretrained(model).eval()
    for name in (*NAMES, "mel"):
        copied = opened.model.generate(1, name, seed=3, guidance_scale=1.5).codes
        assert copied.tolist() == here.generate(1, name, seed=3, guidance_scale=1.5).codes.tolist()
    assert len(opened("contact eczema", num_images=2, seed=0)) == 2
    shipped = IsicVQModel.from_pretrained("model_cards/isic-vq-128")
    assert shipped.config.class_names[0] == "melanoma" != opened.model.config.class_names[0]
