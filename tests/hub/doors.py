"""The table of doors: every way to open a repository, from a folder, from a Hub, and offline from the cache.

    python tests/hub/doors.py model_cards/isic-vq-128 --output table.md

pushes the folder to a local Hub, wipes the caches, pulls it, opens every door in processes of their own and compares
what comes out, number by number, with what the folder's model gives. Codes must be bit-equal.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import open_doors  # noqa: E402
from fake_hub import FakeHub  # noqa: E402

REPO = "user/isic-vq-test"
PLACES = ("local", "Hub", "offline")
PACKAGE = {True: "with the package", False: "without it"}
# What the libraries do not allow, by who opens, door and place, with what they say.
REFUSED = {
    ("with the package", "DiffusionPipeline", "local"): "trust_remote_code=True",  # a custom pipeline, always
    ("with the package", "DiffusionPipeline", "Hub"): "trust_remote_code=True",
    ("with the package", "DiffusionPipeline", "offline"): "trust_remote_code=True",
    (
        "with the package",
        "DiffusionPipeline, trusted",
        "offline",
    ): "offline mode",  # it lists the files on the Hub
    ("with the package", "pipeline(model)", "local"): "infer task",  # the task is asked of the Hub
    ("with the package", "pipeline(model)", "offline"): "infer task",
    ("without it", "AutoModel, not trusted", "local"): "trust_remote_code=True",
    ("without it", "AutoModel, not trusted", "Hub"): "trust_remote_code=True",
    ("without it", "AutoModel, not trusted", "offline"): "trust_remote_code=True",
    ("without it", "DiffusionPipeline", "offline"): "offline mode",
}


def environment(home: Path, url: str | None = None, offline: bool = False) -> dict[str, str]:
    """Variables of a process with Hugging Face caches of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    hub = {"HF_ENDPOINT": url, "HF_TOKEN": "hf_fake_admin"} if url else {}
    return {
        **kept,
        **hub,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": str(int(offline or url is None)),
        "OMP_NUM_THREADS": "1",
    }


def doors_of(package: bool, place: str) -> list[str]:
    """The doors that lead to a place: a folder has no revisions."""
    doors = open_doors.WITH_PACKAGE if package else open_doors.WITHOUT_PACKAGE
    return [name for name in doors if place != "local" or not name.endswith("revision")]


def open_all(repo: str, package: bool, place: str, image: Path, variables: dict[str, str]) -> dict[str, Any]:
    """Open every door to a place; returns what `open_doors` wrote, by door."""
    task = {"repo": repo, "package": package, "doors": doors_of(package, place), "image": str(image)}
    done = subprocess.run(
        [sys.executable, HERE / "open_doors.py"],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        env=variables,
        cwd=variables["HF_HOME"],
        check=False,
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or len(outcomes) != len(task["doors"]):
        raise RuntimeError(
            f"{place}: {len(outcomes)} of {len(task['doors'])} doors answered: {done.stderr[-2000:]}"
        )
    return {outcome.pop("door"): outcome for outcome in outcomes}


def references(folder: Path, image: Path) -> dict[str, np.ndarray]:
    """What must come out: the folder's model and processor, opened here."""
    from isic_vq import IsicVQImageProcessor, IsicVQModel

    model = IsicVQModel.from_pretrained(folder)
    open_doors.IMAGE = str(image)
    return {
        "generate": open_doors.generated(model),
        "encode": open_doors.encoded(model.vqvae),
        "sample": open_doors.sampled(model.prior),
        "process": open_doors.processed(IsicVQImageProcessor(size=model.config.vqvae_config.image_size)),
    }


def kind_of(door: str) -> str:
    """Which of the references a door must give."""
    if "ImageProcessor" in door:
        return "process"
    if "vqvae" in door or "VQVAE" in door:
        return "encode"
    if "prior" in door or "PixelCNN" in door:
        return "sample"
    return "generate"


def verdict(outcome: dict[str, Any], expected: np.ndarray, refusal: str | None) -> str:
    """One cell of the table: "pass", "refused by the library", or what is wrong."""
    if "error" in outcome:
        wanted = refusal is not None and refusal in outcome["error"]
        return "refused by the library" if wanted else outcome["error"]
    if refusal is not None:
        return "opened, though the library used to refuse it"
    found = np.array(outcome["values"]).reshape(outcome["shape"])
    equal = outcome["dtype"] == str(expected.dtype) and np.array_equal(found, expected)
    return "pass" if equal else "other numbers"


def table(folder: Path, workspace: Path) -> list[dict[str, str]]:
    """A row for each door: who opens it, and what happened in each place.

    Args:
        folder: the repository folder.
        workspace: an empty folder for caches.
    """
    from PIL import Image

    image = workspace / "image.png"
    levels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(levels).resize((240, 180)).save(image)
    expected = references(folder, image)
    hub = FakeHub().start()
    try:
        for name in ("push", "local"):
            (workspace / name).mkdir()
        online = environment(workspace / "push", hub.url)
        for command in (["push", folder, REPO, "--tag", "v1"], ["pull", REPO, "-o", workspace / "pulled"]):
            subprocess.run([sys.executable, "-m", "isic_vq", *map(str, command)], env=online, check=True)
        rows = []
        for package, who in PACKAGE.items():
            home = workspace / f"cache-{package}"
            home.mkdir()
            places = {
                "local": (str(workspace / "pulled"), environment(workspace / "local")),
                "Hub": (REPO, environment(home, hub.url)),
                "offline": (REPO, environment(home, hub.url, offline=True)),
            }
            outcomes = {
                place: open_all(repo, package, place, image, variables)
                for place, (repo, variables) in places.items()
            }
            for door in doors_of(package, "Hub"):
                row = {"door": door, "opened": who}
                for place in PLACES:
                    refusal = REFUSED.get((who, door, place))
                    row[place] = (
                        verdict(outcomes[place][door], expected[kind_of(door)], refusal)
                        if door in outcomes[place]
                        else "-"
                    )
                rows.append(row)
        return rows
    finally:
        hub.stop()


def markdown(rows: list[dict[str, str]]) -> str:
    """The table as a page, with the versions it holds for."""
    packages = ("transformers", "diffusers", "huggingface_hub", "torch")
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    cells = [[row["door"], row["opened"], *(row[place] for place in PLACES)] for row in rows]
    lines = [["door", "opened", *PLACES], ["---"] * (len(PLACES) + 2), *cells]
    table_text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""# Doors

Every way to open the repository of the shipped checkpoint: from a folder, from a Hub, and offline from the cache. "pass": codes
(for image processors, pixels) are bit-equal to those of the folder's model. Made by `python tests/hub/doors.py` with {versions}.

{table_text}

Refused: diffusers runs no pipeline of a repository's own without `trust_remote_code=True`, whoever has the package, and asks the
Hub for the list of files even if all are in the cache (a pulled folder opens offline). transformers asks the Hub for a
task that is not named. Code that is not trusted does not run.
"""


def main() -> None:
    """Print the table and, if asked, write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", "-o", type=Path, help="Markdown page to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as workspace:
        page = markdown(table(arguments.folder.resolve(), Path(workspace)))
    print(page)
    if arguments.output:
        arguments.output.write_text(page)


if __name__ == "__main__":
    main()
