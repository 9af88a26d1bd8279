"""The layout of a model's repository: which files of a folder belong to it, and whether they are complete.

An allow-list: what is not named here, such as images, caches, checkpoints or a `.env`, never leaves this machine.
"""

import os
import re
from collections.abc import Container
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError, safe_open

from isic_vq.hub.pretrained import ModelError, read_object
from isic_vq.yaml_text import read_yaml

INDEX_FILE = "model.safetensors.index.json"
REQUIRED = ("config.json", "model_index.json", INDEX_FILE, "preprocessor_config.json", "README.md")
LAYOUT = (
    *REQUIRED,
    "provenance.json",
    "comparison.md",
    "LICENSE*",
    "*.py",
    *(
        f"{part}/{name}"
        for part in ("vqvae", "prior")
        for name in ("config.json", "model.safetensors", "*.py")
    ),
    "previews/*.png",
    "figures/*.png",
    "reports/*.json",
    "onnx/*.onnx",
)
MADE_LATER = ("reports/", "previews/", "figures/", "onnx/", "comparison.md")
MODEL_TYPE = "isic_vq"
WRITER = "isic-vq"  # how the PNG text field Software of our own pictures starts
# And how their field Comment starts if they show no source image.
COMMENTS = ("synthetic image", "VQ-VAE reconstruction", "plot")
SIBLING = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)
HUB_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{20,}")


def sort_files(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Paths of a folder that belong to the layout, and the paths and sizes in bytes of the others.

    Hidden files never belong, nor symbolic links, which may lead anywhere, but for code, which `model_cards/` links.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder: expected one that isic-vq export has written")
    going, left_out = [], []
    for parent, directories, names in os.walk(folder):
        links = [name for name in directories if os.path.islink(os.path.join(parent, name))]
        for name in [*names, *links]:
            file = Path(parent, name)
            path = file.relative_to(folder).as_posix()
            is_ours = not file.is_symlink() or file.resolve().suffix == ".py"
            if in_layout(path) and file.is_file() and is_ours:
                going.append(path)
            else:
                left_out.append((path, file.lstat().st_size))
    return sorted(going), sorted(left_out)


def in_layout(path: str) -> bool:
    """Whether a repository of ours may hold a file of this path."""
    hidden = any(name.startswith(".") for name in path.split("/"))
    return not hidden and any(
        path.count("/") == pattern.count("/") and fnmatchcase(path, pattern) for pattern in LAYOUT
    )


def check_folder(folder: Path, files: list[str]) -> None:
    """Refuse a repository folder that is not complete or holds what must not be published, by the first problem."""
    for name in REQUIRED:
        if name not in files:
            linked = " that is no symbolic link (cp -rL copies the files themselves)"
            command = "card" if name == "README.md" else "export"
            raise ModelError(
                f"{folder} lacks {name}: expected a file{linked if (folder / name).is_symlink() else ''}, "
                f"which isic-vq {command} writes"
            )
    kind = read_object(folder / "config.json").get("model_type")
    if kind != MODEL_TYPE:
        raise ModelError(f"{folder} is a {kind!r} model: expected {MODEL_TYPE!r}")
    _check_code(folder, files)
    _check_weights(folder, files)
    if not read_card(folder / "README.md").data.to_dict():  # no filter of the Hub would find it
        raise ModelError(f"{folder / 'README.md'} has no metadata at its start: run isic-vq card")
    for path in files:
        if path.endswith(".png"):
            check_picture(folder / path)
        if not path.endswith((".safetensors", ".onnx")) and HUB_TOKEN.search((folder / path).read_bytes()):
            raise ModelError(f"{folder / path} holds a Hub token: remove it there and revoke it, then push")


def _check_code(folder: Path, files: list[str]) -> None:
    """Refuse a folder without the code that its configs name, or that this code imports."""
    needed: dict[str, str] = {}
    for name in ("config.json", "preprocessor_config.json"):
        auto_map = read_object(folder / name).get("auto_map")
        if not isinstance(auto_map, dict) or not auto_map:
            raise ModelError(f"{folder / name} names no code (auto_map): run isic-vq export again")
        needed |= {f"{str(target).partition('.')[0]}.py": name for target in auto_map.values()}
    for part, target in read_object(folder / "model_index.json").items():
        module = str(target[0] if isinstance(target, list) and target else target)
        if part == "_class_name":
            needed[f"{module}.py"] = "model_index.json"
        elif part != "license" and not part.startswith("_"):
            needed[f"{part}/{module}.py"] = "model_index.json"
    for path in files:
        if path.endswith(".py") and "/" not in path:
            imported = SIBLING.findall((folder / path).read_text(encoding="utf-8", errors="replace"))
            needed |= {f"{module}.py": path for module in imported}
    for path, name in needed.items():
        if path not in files:
            raise ModelError(f"{folder} lacks {path}, which its {name} names: run isic-vq export again")


def _check_weights(folder: Path, files: list[str]) -> None:
    weight_map = read_object(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX_FILE} has no weight_map: write it anew with isic-vq export")
    named = set(map(str, weight_map.values()))
    for path in sorted(named):
        if not is_safe(path):
            raise ModelError(f"{folder / INDEX_FILE} names {path!r}: expected a path inside the folder")
        if path not in files:
            raise ModelError(f"{folder} lacks {path}, which its index names: run isic-vq export again")
    for path in sorted(named.union(path for path in files if path.endswith(".safetensors"))):
        try:
            with safe_open(folder / path, "np") as weights:
                names = set(weights.keys())
        except SafetensorError as error:
            raise ModelError(f"{folder / path} is damaged ({error}): run isic-vq export again") from error
        odd = names ^ {name for name, file in weight_map.items() if file == path}
        if odd:
            raise ModelError(
                f"{folder / path} and the index disagree about {len(odd)} tensors, such as {min(odd)}: export again"
            )


def read_card(path: Path) -> ModelCard:
    """Read a card that anybody may have written; ModelError if its metadata cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        if match := REGEX_YAML_BLOCK.search(text):
            read_yaml(match[2])
        return ModelCard(text)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{path} has unreadable metadata ({reason}): run isic-vq card") from error


def check_picture(path: Path) -> None:
    """Raise ModelError for a picture that does not say that we drew it, and of what: it may be of a patient."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            fields = image.info
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ModelError(f"{path} is not a readable PNG: remove it, or run isic-vq export") from error
    if not str(fields.get("Software")).startswith(f"{WRITER} "):
        raise ModelError(
            f"{path} may be a data image, as its PNG field Software does not begin with {WRITER}: remove it"
        )
    if not str(fields.get("Comment")).startswith(COMMENTS):
        raise ModelError(f"{path} may show a data image (PNG field Comment is none of {COMMENTS}): remove it")


def check_replaceable(target: Path, expected: Container[str] = ()) -> None:
    """Refuse to replace a folder that is not a repository of ours, or to which somebody has added files.

    `expected` are the paths that will be in it again; none if it is to be written anew.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    config = target / "config.json"
    if not config.is_file() or read_object(config).get("model_type") != MODEL_TYPE:
        raise ModelError(f"{target} exists and is not a model of {WRITER}: choose another output folder")
    ours, others = sort_files(target)
    foreign = [path for path, _ in others if path not in expected]
    if expected:  # what somebody measured or drew for a pulled model is theirs
        foreign += [path for path in ours if path.startswith(MADE_LATER) and path not in expected]
    if foreign:
        raise ModelError(f"{target} would lose files such as {foreign[0]}: choose another folder")


def is_safe(path: str) -> bool:
    """Whether a foreign path stays inside the folder that it is joined to, on every system."""
    names = path.split("/")
    return not (re.search(r"[\\:\x00-\x1f]", path) or any(name in ("", ".", "..", ".git") for name in names))
