"""Replace the copies of the package's code in a repository folder by links to it, so that it is in git once.

Run it after `isic-vq export ... model_cards/NAME`: `python model_cards/link_code.py model_cards/NAME`. What reads the
folder, `isic-vq push` and `pip` among them, reads the files behind the links.
"""

import os
import sys
from pathlib import Path

CODE = Path(__file__).resolve().parents[1] / "src" / "isic_vq" / "models"


def link_code(folder: Path) -> None:
    """Link every code file of a repository folder.

    Raises:
        ValueError: it is no repository folder, or a copy differs from the package's file.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no repository folder: expected one that isic-vq export has written")
    for copy in sorted(path for path in folder.rglob("*.py") if not path.is_symlink()):
        original = CODE / ("component.py" if copy.name == "isic_vq.py" else copy.name)
        if not original.is_file() or copy.read_bytes() != original.read_bytes():
            raise ValueError(f"{copy} differs from {original.name} of the package: export the folder again")
        copy.unlink()
        copy.symlink_to(os.path.relpath(original, copy.parent.resolve()))


if __name__ == "__main__":
    link_code(Path(sys.argv[1]))
