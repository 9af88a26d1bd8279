"""Two repositories with other code each, opened in one process without the package: neither runs the other's code."""

import json
import os
import shutil
import subprocess
import sys
from itertools import permutations

import pytest

from isic_vq import IsicVQConfig, IsicVQModel

CLASSES = {
    "pipeline.py": "IsicVQPipeline",
    "pipeline_isic_vq.py": "UnconditionalImageGenerationPipeline",
    "image_processing_isic_vq.py": "IsicVQImageProcessor",
    "modeling_isic_vq.py": "IsicVQModel",
}
ORDERS = [("a",), ("b",), *permutations("ab")]
SCRIPT = """
import json, os, sys, warnings
warnings.filterwarnings("ignore")
sys.modules["isic_vq"] = None
from diffusers import DiffusionPipeline
from transformers import AutoImageProcessor, AutoModel, pipeline

repositories, orders = json.loads(sys.argv[1])
results = os.dup(1)
os.dup2(2, 1)

def codes(name):
    model, piped, diffused, _ = doors[name]
    settings = {"num_images": 3, "seed": 0}
    return [
        model.generate(**settings).codes.flatten().tolist(),
        piped(**settings, return_codes=True)["codes"].flatten().tolist(),
        diffused(**settings, output_type="latent").images.flatten().tolist(),
    ]

for order in orders:
    if not (child := os.fork()):
        try:
            doors = {
                name: (
                    AutoModel.from_pretrained(repositories[name], trust_remote_code=True),
                    pipeline(task, model=repositories[name], trust_remote_code=True),
                    DiffusionPipeline.from_pretrained(repositories[name], trust_remote_code=True),
                    AutoImageProcessor.from_pretrained(repositories[name], trust_remote_code=True),
                )
                for task in ["unconditional-image-generation"] for name in order
            }
            found = {name: {"codes": codes(name), "origins": [door.origin for door in doors[name]]} for name in order}
            os.write(results, json.dumps(found).encode() + b"\\n")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of one name and one model; b's code says so and draws with 1 - u where a's draws with u."""
    root = tmp_path_factory.mktemp("two")
    config = IsicVQConfig(
        vqvae_config={"image_size": 16, "hidden_sizes": (4, 4), "num_codes": 7, "code_dim": 3},
        prior_config={"num_codes": 7, "grid_size": 4, "hidden_size": 8, "num_layers": 1, "head_size": 8},
    )
    IsicVQModel(config).eval().save_pretrained(root / "a" / "tiny")
    shutil.copytree(root / "a" / "tiny", root / "b" / "tiny")
    for name in "ab":
        for file, class_name in CLASSES.items():
            with (root / name / "tiny" / file).open("a") as code:
                code.write(f"\n\n{class_name}.origin = {name!r}\n")
    with (root / "b" / "tiny" / "sampling.py").open("a") as code:
        code.write(
            "\n\n_drawn = position_uniforms\n\n\ndef position_uniforms(*args):\n    return 1 - _drawn(*args)\n"
        )
    return {name: root / name / "tiny" for name in "ab"}


def open_in_orders(repositories, environment):
    """What comes out of each repository's doors, for each order of opening them."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([repositories, ORDERS])],
        env=environment,
        cwd=environment["HF_HOME"],
        capture_output=True,
        text=True,
        check=False,
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(outcomes) == len(ORDERS), done.stderr[-3000:]
    return dict(zip(ORDERS, outcomes, strict=True))


def check(outcomes):
    alone = {name: outcomes[(name,)][name] for name in "ab"}
    assert alone["a"]["codes"] != alone["b"]["codes"], "premise: the code makes a difference"
    for name in "ab":
        assert alone[name]["codes"][0] == alone[name]["codes"][1] == alone[name]["codes"][2]
        assert alone[name]["origins"] == [name] * len(CLASSES)
        for order in permutations("ab"):
            assert outcomes[order][name] == alone[name], f"{name} of {order}"


@pytest.mark.slow
def test_two_folders_do_not_mix_their_code(folders, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    check(open_in_orders({name: str(folder) for name, folder in folders.items()}, environment))


@pytest.mark.slow
def test_two_hub_repositories_do_not_mix_their_code(folders, hub, hub_env, tmp_path):
    names = {name: f"user/tiny-{name}" for name in "ab"}
    upload = "import sys; from huggingface_hub import HfApi; HfApi().create_repo(sys.argv[1]); "
    upload += "HfApi().upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"
    for name, folder in folders.items():
        subprocess.run([sys.executable, "-c", upload, names[name], str(folder)], env=hub_env, check=True)
    check(open_in_orders(names, hub_env))
