"""Links of the site: files outside of docs/ are copied to `source/`, so that the pages read as they do in the repository.

A hook of mkdocs.
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()((?:\.\./)+[^)\s#]+)(#[^)\s]*)?(?=\))")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links of a page that leave docs/ to copies of the files; folders have none, and lose their links."""
    folder = Path(page.file.abs_src_path).parent

    def moved(match: re.Match[str]) -> str:
        target = (folder / match[1]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        name = f"source/{target.relative_to(ROOT).as_posix()}"
        if target.is_dir():
            return "#"
        if name.endswith(".md"):  # as text: its own links would lead nowhere
            name += ".txt"
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, content=target.read_bytes()))
        return os.path.relpath(ROOT / "docs" / name, folder)

    return LINK.sub(moved, markdown)
