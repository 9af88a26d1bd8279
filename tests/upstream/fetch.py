"""Fetch the test mixins of the installed transformers and diffusers, outside of this repository.

    python tests/upstream/fetch.py [FOLDER]

transformers' are in its source archive, which pip downloads. diffusers' archive holds helpers only; its pipeline mixin is
taken from its git repository at the tag of the version (`DIFFUSERS_GIT` names a mirror, `DIFFUSERS_REF` another commit).
"""

import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

DEFAULT = Path(os.environ.get("ISIC_VQ_UPSTREAM") or Path.home() / ".cache" / "isic-vq-upstream")
DIFFUSERS_GIT = "https://github.com/huggingface/diffusers"
PIPELINE_FILES = [f"tests/pipelines/{name}.py" for name in ("test_pipelines_common", "pipeline_params")]


def upstream_tests(package: str, root: Path = DEFAULT) -> Path:
    """Where the tests of the installed version of a package are unpacked."""
    return root / f"{package}-{version(package)}" / "tests"


def unpack(archive: Path, root: Path) -> None:
    """Unpack the tests of an archive whose only top folder is named after package and version."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar if Path(member.name).parts[1:2] == ("tests",)]
        tar.extractall(root, members, filter="data")


def fetch_archive(package: str, root: Path) -> None:
    """Download a package's source archive with pip, and unpack its tests."""
    with TemporaryDirectory() as folder:
        requirement = f"{package}=={version(package)}"
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--dest", folder]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
        unpack(next(Path(folder).glob("*.tar.gz")), root)


def fetch_pipeline_mixin(root: Path) -> None:
    """Take diffusers' pipeline mixin out of its repository."""
    target = upstream_tests("diffusers", root).parent
    source = os.environ.get("DIFFUSERS_GIT", DIFFUSERS_GIT)
    reference = os.environ.get("DIFFUSERS_REF", f"v{version('diffusers')}")
    with TemporaryDirectory() as folder:

        def git(*arguments: str) -> bytes:
            return subprocess.run(
                ["git", "-C", folder, *arguments], check=True, stdout=subprocess.PIPE
            ).stdout

        git("init", "--quiet")
        git("fetch", "--quiet", "--depth", "1", "--filter=blob:none", source, reference)
        git("remote", "add", "origin", source)  # where a partial fetch finds its files
        for name in PIPELINE_FILES:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(git("show", f"FETCH_HEAD:{name}"))


def main() -> None:
    root = Path(sys.argv[1]) if sys.argv[1:] else DEFAULT
    for package in ("transformers", "diffusers"):
        fetch_archive(package, root)
    fetch_pipeline_mixin(root)
    print(f"tests of transformers and diffusers are in {root}")  # noqa: T201


if __name__ == "__main__":
    main()
