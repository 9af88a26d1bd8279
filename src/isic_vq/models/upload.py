"""Make a repository of the Hub exactly a folder: one commit, checked by hash, and one clear error if that fails.

Part of the folder that a repository ships, so that `push_to_hub` of a model that was opened without the package works.

Differs from `HfApi.upload_folder`: files that the folder lacks are deleted in the same commit (weights that an older
push left would be read instead of the new ones); the commit names its parent, so that somebody else's commit in
between is not overwritten; and the new commit's hashes are compared with the folder's.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    errors,
    hf_hub_download,
)
from huggingface_hub.hf_api import RepoFile

HUBS_OWN = ".gitattributes"  # says what is a large file; the Hub writes it
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}|Bearer\s+\S+")
HUBS_ERRORS = (
    errors.HTTPError,
    errors.LocalTokenNotFoundError,
    errors.OfflineModeIsEnabled,
    errors.HFValidationError,
)
KNOWN_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    errors.HTTPError,
    errors.EntryNotFoundError,
    errors.XetDownloadError,
)

Token = str | bool | None


class HubError(OSError):
    """The Hub did not do what was asked; the text names the repository, the reason and the way out."""


class PlannedFile(NamedTuple):
    """The change that a push makes to one file of the repository."""

    action: Literal["add", "change", "same", "delete"]
    path: str
    size: int  # in bytes; of the file on the Hub if it is deleted


@dataclass(frozen=True)
class UploadResult:
    """The result of a push."""

    url: str  # the commit's page
    commit: str  # its id; that of the last commit if nothing had to change
    pr_url: str | None  # page of the pull request, if one was asked for
    plan: list[PlannedFile]  # every file of the folder and of the repository

    @property
    def changed(self) -> bool:
        """Whether there was anything to commit."""
        return any(file.action != "same" for file in self.plan)


@contextmanager
def hub_errors(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn whatever huggingface_hub raises in the block into a `HubError`; errors of the local disk pass as they are."""
    try:
        yield
    except KNOWN_ERRORS as error:
        root = _root(error)
        local = isinstance(root, OSError) and root.errno is not None and not isinstance(root, ConnectionError)
        if isinstance(error, HubError) or local:
            raise
        raise _hub_error(root, repo_id, revision) from (None if TOKEN.search(f"{error}{root}") else error)


def explained(error: BaseException, repo_id: str, revision: str | None = None) -> HubError | None:
    """Find the failure of the Hub or of the network behind an error of transformers.

    None if there is none, or if the Hub lacks a file: transformers says which.
    """
    root = _root(error)
    if not isinstance(root, HUBS_ERRORS) or isinstance(root, errors.RemoteEntryNotFoundError):
        return None
    return _hub_error(root, repo_id, revision)


def _hub_error(root: BaseException, repo_id: str, revision: str | None) -> HubError:
    return HubError(" ".join(TOKEN.sub("***", _explain(root, repo_id, revision)).split()))


def _root(error: BaseException) -> BaseException:
    while not isinstance(error, HUBS_ERRORS) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _explain(error: BaseException, repo: str, revision: str | None) -> str:
    match error:
        case errors.HFValidationError():
            return f"{repo!r} is no repository: expected user/name of letters, digits, '-', '_' and '.'"
        case errors.LocalTokenNotFoundError():
            return f"{repo} needs a Hub token and there is none: {LOG_IN}"
        case errors.OfflineModeIsEnabled():
            return f"{repo} is not reached because HF_HUB_OFFLINE is set: unset it and run this again"
        case errors.HfHubHTTPError():
            return _explain_answer(error, repo, revision)
    cause = f"({type(error).__name__}: {error})"
    if type(error).__name__ == "LocalProtocolError":
        return f"your token cannot be sent for {repo}, it holds a line break or the like: {LOG_IN} again"
    if isinstance(error, errors.HTTPError):
        broke = f"the connection to {constants.ENDPOINT} broke while working on {repo} {cause}"
        return f"{broke}: run this again, it goes on with what is missing"
    return f"the Hub's answer about {repo} is not as expected {cause}: run this again"


def _explain_answer(error: errors.HfHubHTTPError, repo: str, revision: str | None) -> str:
    status, page = error.response.status_code, f"{constants.ENDPOINT}/{repo}"
    says = f" (the Hub says: {error.server_message})" if error.server_message else ""
    has_token = "authorization" in error.response.request.headers
    match error:
        case errors.GatedRepoError():
            return f"{repo} is gated: ask for access at {page}, then {LOG_IN}"
        case errors.DisabledRepoError():
            return f"{repo} is disabled by the Hub or its owner: see {page}"
        case errors.RevisionNotFoundError():
            wanted = revision or "main"
            return f"{repo} has no revision {wanted}: expected a branch, tag or commit of {page}/commits"
        case errors.RemoteEntryNotFoundError():
            return f"{repo} lacks a file that it was expected to hold{says}: run this again"
        case errors.RepositoryNotFoundError() if has_token:
            return f"{repo} does not exist, or your token may not see it: correct the name, or {LOG_IN} as a member"
        case errors.RepositoryNotFoundError():
            return f"{repo} does not exist or is private: correct the name, or {LOG_IN}"
    match status:
        case 401 if has_token:
            return f"the Hub refuses your token for {repo}, it may have expired: {LOG_IN} again"
        case 401:
            return f"{repo} needs a Hub token: {LOG_IN}"
        case 403:
            way_out = f"make one that may, with write permission for a push, at {constants.ENDPOINT}/settings/tokens"
            return f"your token may not do this with {repo}{says}: {way_out}, then {LOG_IN}"
        case 412:
            return f"somebody else committed to {repo} meanwhile and nothing was changed: look at it, then run this again"
        case 429:
            return f"the Hub limits requests, {repo} has to wait: run this again {_when(error)}"
    if status >= 500:
        return f"the Hub is in trouble (status {status}) and {repo} was not completed: run this again later{says}"
    return f"the Hub refuses what was asked of {repo} (status {status}){says}: see {page}"


def _when(error: errors.HfHubHTTPError) -> str:
    headers = error.response.headers
    seconds = re.fullmatch(r"(\d+)", headers.get("retry-after", ""))
    seconds = seconds or re.search(r"\bt\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return f"in {seconds[1]} seconds" if seconds else "in a few minutes"


def remote_files(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    """List every file of a revision, by its path."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def plan_upload(
    api: HfApi, folder: Path, files: Iterable[str], repo_id: str, revision: str
) -> list[PlannedFile]:
    """Compare files of a local folder with a revision of a repository, by hash; nothing is sent."""
    remote = remote_files(api, repo_id, revision)
    hashes = api.verify_repo_checksums(repo_id, revision=revision, local_dir=folder)
    differing, plan = {mismatch["path"] for mismatch in hashes.mismatches}, []
    for path in files:
        action: Any = "add" if path not in remote else "change" if path in differing else "same"
        plan.append(PlannedFile(action, path, (folder / path).stat().st_size))
    gone = remote.keys() - {HUBS_OWN, *files}
    plan += [PlannedFile("delete", path, remote[path].size) for path in gone]
    return sorted(plan, key=lambda planned: planned.path)


def upload_folder(
    folder: Path,
    files: Iterable[str],
    repo_id: str,
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    token: Token = None,
) -> UploadResult:
    """Make a repository hold exactly these files, in one commit; then check its hashes.

    Large files go first, and nothing is visible before the commit. What an interrupted upload left on the Hub is not
    sent again. If all files are there already, there is no commit.

    Args:
        folder: the local folder.
        files: paths of files, relative to the folder and to the repository.
        repo_id: "user/name", or the name of one of your own; made if it does not exist.
        commit_message: the commit's, or the pull request's, title.
        commit_description: its text.
        private: visibility of the repository; None leaves it as it is, and a new one as the account's default.
        create_pr: propose the commit as a pull request.
        revision: the branch, made from main if it does not exist; main by default.
        tag: name for the commit, which must be new.
        token: a Hub token; by default the one of the login.

    Raises:
        ValueError: a pull request together with a revision or a tag.
        HubError: the Hub refuses, is not reached, or holds something else afterwards.
    """
    if create_pr and (revision or tag):
        raise ValueError(
            "a pull request proposes a commit to main: expected no revision and no tag beside create_pr"
        )
    api, files = HfApi(token=token), list(files)
    with hub_errors(repo_id, revision):
        repo_id = _make_repository(api, repo_id, private)
        has_branch = check_target(api, repo_id, revision, tag)
        commit = api.repo_info(repo_id, revision=revision if has_branch else None).sha
        assert commit is not None, "the Hub makes every repository with a first commit"
        _refuse_other_model(api, repo_id, commit)
        plan = plan_upload(api, folder, files, repo_id, commit)
        new = [CommitOperationAdd(p.path, folder / p.path) for p in plan if p.action in ("add", "change")]
        gone = [CommitOperationDelete(p.path, is_folder=False) for p in plan if p.action == "delete"]
        if new:
            # A .gitignore in the repository, which the commit deletes, must not leave files out: hence an empty one.
            branch = revision if has_branch else None
            api.preupload_lfs_files(
                repo_id, new, revision=branch, create_pr=create_pr, free_memory=False, gitignore_content=""
            )
        if revision and not has_branch:
            api.create_branch(repo_id, branch=revision, revision=commit)
        url, pr_url = f"{constants.ENDPOINT}/{repo_id}/commit/{commit}", None
        if new or gone:
            done = api.create_commit(
                repo_id,
                [*new, *gone],
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                parent_commit=commit,
                create_pr=create_pr,
            )
            url, commit, pr_url = done.commit_url, done.oid, done.pr_url
            wrong = [p.path for p in plan_upload(api, folder, files, repo_id, commit) if p.action != "same"]
            if wrong:
                raise HubError(
                    f"after the push {repo_id} differs from the folder in {wrong[:3]}: push it again"
                )
        if tag:
            api.create_tag(repo_id, tag=tag, revision=commit)
    return UploadResult(url, commit, pr_url, plan)


def _make_repository(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Make the repository if need be and return its full name; refuse one of the other visibility."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    is_private = api.repo_info(repo_id).private
    if private is not None and is_private != private:
        is_now, wanted = ("private", "public") if is_private else ("public", "private")
        raise HubError(
            f"{repo_id} is {is_now}, not {wanted}: change that at {constants.ENDPOINT}/{repo_id}/settings; nothing was sent"
        )
    return repo_id


def _refuse_other_model(api: HfApi, repo_id: str, revision: str) -> None:
    """Refuse a repository that holds a model of another kind, which a push would remove."""
    if not api.file_exists(repo_id, "config.json", revision=revision):
        return
    kind = model_type(repo_id, revision, api.token)
    if kind != "isic_vq":
        raise HubError(
            f"{repo_id} holds another model (model_type {kind!r}), which a push would remove: choose another name; "
            "nothing was sent"
        )


def full_name(repo_id: str, token: Token = None) -> str:
    """Add the owner, who is logged in, to a repository's name that lacks one."""
    if "/" in repo_id:
        return repo_id
    with hub_errors(repo_id):
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def model_type(repo_id: str, revision: str, token: Token) -> Any:
    """Read the model_type of a repository's config.json; None if it is not a config."""
    config = Path(hf_hub_download(repo_id, "config.json", revision=revision, token=token))
    try:
        return json.loads(config.read_bytes()).get("model_type")
    except (ValueError, AttributeError):
        return None


def check_target(api: HfApi, repo_id: str, revision: str | None, tag: str | None) -> bool:
    """Whether there is a branch to commit to.

    Raises:
        HubError: `revision` is a tag or a commit, or the repository has a tag of this name: neither can move.
    """
    refs = api.list_repo_refs(repo_id)
    tags = [ref.name for ref in refs.tags]
    if tag in tags:
        raise HubError(
            f"{repo_id} has a tag {tag} already and nothing was sent: choose another name, or delete it at "
            f"{constants.ENDPOINT}/{repo_id}"
        )
    if revision is None or revision.startswith("refs/") or revision in [ref.name for ref in refs.branches]:
        return True
    if re.fullmatch("[0-9a-f]{40}", revision) or revision in tags:
        raise HubError(
            f"{revision} is a tag or a commit of {repo_id}: expected a branch to push to, such as main"
        )
    return False
