"""A tiny repository folder, complete as `isic-vq export` and `isic-vq card` would leave it, and hashes of its files."""

import hashlib
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from isic_vq import IsicVQModel, PixelCNNConfig, PixelCNNModel, VQVAEConfig, VQVAEModel

VQVAE = {"image_size": 8, "hidden_sizes": (4,), "num_residual_blocks": 0, "num_codes": 5, "code_dim": 2}
PRIOR = {
    "num_codes": 5,
    "grid_size": 4,
    "hidden_size": 4,
    "num_layers": 1,
    "head_size": 4,
    "first_kernel_size": 3,
}
CARD = "---\nlicense: cc-by-nc-4.0\nlibrary_name: transformers\n---\n# tiny\n"
WEIGHTS = ("vqvae/model.safetensors", "prior/model.safetensors")


def write_picture(path: Path, software: str | None, comment: str = "plot") -> None:
    """Write a small PNG, with the text fields by which our own pictures are known, or without."""
    fields = PngInfo()
    if software:
        fields.add_text("Software", software)
        fields.add_text("Comment", comment)
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4), (200, 150, 130)).save(path, pnginfo=fields)


def write_repository(folder: Path) -> Path:
    """Write a repository of a tiny model with random weights."""
    vqvae, prior = VQVAEModel(VQVAEConfig(**VQVAE)), PixelCNNModel(PixelCNNConfig(**PRIOR))
    IsicVQModel.from_parts(vqvae, prior).save_pretrained(folder)
    write_picture(folder / "previews" / "unconditional.png", "isic-vq 0.1.0")
    (folder / "README.md").write_text(CARD)
    (folder / "LICENSE-WEIGHTS").write_text("CC BY-NC 4.0\n")
    (folder / "provenance.json").write_text("{}\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder by their path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def oids(files: dict[str, bytes]) -> dict[str, set[str]]:
    """The two ids that the Hub may list a file under: SHA-256 of large files, git's blob id of the others."""
    return {
        path: {hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        for path, data in files.items()
    }
