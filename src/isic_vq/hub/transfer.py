"""Push a repository folder to the Hub, and pull one from it: whole, checked, and nothing that does not belong.

What is pushed are the files of the layout; the others stay here and are named. What is pulled is compared with the
Hub's own hashes, is neither opened nor run, and takes its place when it is complete.
"""

import glob
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from isic_vq import __version__
from isic_vq.files import name_full_disk, replaced_directory
from isic_vq.hub.card_check import CODE_BLOCK, NAME, check_card, number_problems
from isic_vq.hub.layout import MODEL_TYPE, WRITER, check_folder, check_replaceable, is_safe, sort_files
from isic_vq.hub.pretrained import ModelError
from isic_vq.models import upload
from isic_vq.models.upload import HubError, PlannedFile, Token, UploadResult, hub_errors


@dataclass(frozen=True)
class Push:
    """What a push did, or would do."""

    plan: list[PlannedFile]  # every file of the layout and of the repository
    left_out: list[
        tuple[str, int]
    ]  # files of the folder that are not of the layout, with their sizes in bytes
    exists: bool  # whether the repository is there: a push makes it, a dry run does not
    result: UploadResult | None  # the upload's; None for a dry run


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    commit_message: str = f"Push with isic-vq {__version__}",
    dry_run: bool = False,
    token: Token = None,
) -> Push:
    """Make a Hub repository exactly what a repository folder holds of the layout.

    Args:
        folder: a repository folder, as `isic-vq export` and `isic-vq card` leave it.
        repo_id: "user/name".
        private: visibility of the repository; by default as it is, or the account's.
        create_pr: propose the commit as a pull request.
        revision: the branch; main by default.
        tag: name for the commit, which must be new.
        commit_message: the commit's title.
        dry_run: only compare; nothing is written, and a public repository needs no token.
        token: a Hub token; by default the one of the login.

    Raises:
        ModelError: the folder is not a complete repository, holds what must not be published, or has a card that
            says what no report says.
        HubError: as `upload_folder` raises it.
    """
    _check_name(repo_id)
    files, left_out = sort_files(folder)
    check_folder(folder, files)
    _check_claims(folder, files)
    if dry_run:
        plan, exists = _compare(HfApi(token=token), folder, files, repo_id, revision, tag)
        return Push(plan, left_out, exists, None)
    result = upload.upload_folder(
        folder,
        files,
        repo_id,
        commit_message=commit_message,
        private=private,
        create_pr=create_pr,
        revision=revision,
        tag=tag,
        token=token,
    )
    return Push(result.plan, left_out, True, result)


def _check_name(repo_id: str) -> None:
    if "/" not in repo_id:  # requests and folders alike would take it for something else
        raise HubError(f"{repo_id!r} is no repository: expected user/name")


def _check_claims(folder: Path, files: list[str]) -> None:
    """Refuse a card that says what no report says."""
    card = folder / "README.md"
    if any(path.startswith("reports/") for path in files):
        problems = check_card(folder)
        if problems:
            raise ModelError(
                f"{card} does not say what the reports say: {problems[0]} (1 of {len(problems)}; see isic-vq card --check)"
            )
        return
    loaded = ModelCard.load(card)
    prose = NAME.sub("", CODE_BLOCK.sub("", loaded.text))
    if "model-index" in loaded.data.to_dict() or any(number_problems(prose, "")):
        raise ModelError(f"{card} has numbers, and the folder no reports/: run isic-vq evaluate")


def _compare(
    api: HfApi, folder: Path, files: list[str], repo_id: str, revision: str | None, tag: str | None
) -> tuple[list[PlannedFile], bool]:
    """Plan a push without writing, and tell whether the repository can be seen."""
    with hub_errors(repo_id, revision):
        try:
            base = revision if upload.check_target(api, repo_id, revision, tag) else None
            return upload.plan_upload(api, folder, files, repo_id, base or constants.DEFAULT_REVISION), True
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return [PlannedFile("add", path, (folder / path).stat().st_size) for path in files], False


def pull(repo_id: str, output: Path, *, revision: str | None = None, token: Token = None) -> Path:
    """Copy a repository of a model into a folder, whole or not at all; no file of it is run.

    The files pass through Hugging Face's cache: a cut connection is resumed, and a repeated pull asks only for the
    files that are missing.

    Args:
        repo_id: "user/name".
        output: the folder: a new one, an empty one, or an earlier pull or export, which is replaced.
        revision: a branch, tag or commit; main by default.
        token: a Hub token; by default the one of the login.

    Returns:
        `output`.

    Raises:
        ModelError: `output` holds something else.
        HubError: the repository cannot be had, is not a model of ours, or arrived damaged.
        OSError: the disk is full.
    """
    _check_name(repo_id)
    target, cache = output.resolve(), Path(constants.HF_HUB_CACHE)
    api = HfApi(token=token)
    with hub_errors(repo_id, revision):
        commit = api.repo_info(repo_id, revision=revision).sha
        assert commit is not None, "a revision is a commit"
        listing = upload.remote_files(api, repo_id, commit)
    listing.pop(upload.HUBS_OWN, None)
    if unsafe := [path for path in listing if not is_safe(path)]:
        raise HubError(f"{repo_id} lists the unsafe path {unsafe[0]!r}: nothing was downloaded")
    if "config.json" not in listing:
        raise HubError(f"{repo_id} holds no config.json: expected the repository of a model")
    check_replaceable(target, listing)
    with hub_errors(repo_id, revision), name_full_disk(cache):
        if upload.model_type(repo_id, commit, token) != MODEL_TYPE:
            raise HubError(f"{repo_id} is no model of {WRITER}: its model_type is not {MODEL_TYPE}")
        names = [glob.escape(path) for path in listing]
        snapshot = Path(snapshot_download(repo_id, revision=commit, token=token, allow_patterns=names))
        damaged = [m["path"] for m in api.verify_repo_checksums(repo_id, revision=commit).mismatches]
    for path in damaged:
        (snapshot / path).resolve().unlink()
    if damaged:
        raise HubError(f"{damaged[0]} of {repo_id} arrived damaged and was thrown away: pull again")
    with replaced_directory(target) as folder:
        for path in listing:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / path, folder / path)
    return output
