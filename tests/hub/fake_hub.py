"""A Hub of repositories in this process, over real HTTP on the loopback interface: what tests push to and pull from.

It answers what huggingface_hub 2.4, transformers 5.23 and diffusers 0.42 ask, from memory: repositories with commits,
branches, tags and pull requests, large files, private and gated ones, and faults on demand.

    python tests/hub/fake_hub.py --port 8421      prints the variables that point a shell at it

Repositories of data sets, `datasets/OWNER/NAME` here, are only read.

Differs from the Hub: no xet (set HF_HUB_DISABLE_XET=1), no spaces, no accounts but the two of `TOKENS`.
"""

import argparse
import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit, urlunsplit

import yaml

TOKENS = {"hf_fake_admin": "user", "hf_fake_other": "other"}  # and whose they are
LARGE = ("*.safetensors", "*.bin", "*.parquet", "*.png", "*.jpg", "*.onnx")
LARGE_BYTES = 10 * 1024 * 1024  # any file above this is large
BODY_KEPT = 4000  # bytes of a request's body that the log keeps
DATE = "2026-01-01T00:00:00.000Z"
MAIN = "refs/heads/main"


class RefusalError(Exception):
    """An error that the server answers with; `code` is the header by which huggingface_hub tells errors apart."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Entry(NamedTuple):
    """A request and the status of its answer, None if there was none."""

    method: str
    path: str
    status: int | None
    headers: dict[str, str]
    body: bytes


@dataclass
class Fault:
    """Something that goes wrong in the next `times` requests to a path that matches; one kind at a time.

    Args:
        path: regular expression, searched in the path.
        method: the requests' method, or any.
        times: how often.
        status: answer with this status instead, and with `headers`.
        after_bytes: cut the connection after so many bytes of the body, of what is sent for GET, else received;
            a HEAD has no body and is not cut.
        corrupt: deliver the file with one bit flipped.
        headers: of the answer with `status`.
    """

    path: str
    method: str | None = None
    times: int = 1
    status: int | None = None
    after_bytes: int | None = None
    corrupt: bool = False
    headers: dict[str, str] = field(default_factory=dict)


def git_hash(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file's content, and whether it is stored as a large file, behind a pointer."""

    content: bytes
    large: bool = False

    @property
    def oid(self) -> str:
        """SHA-256 of a large file, git's SHA-1 of another."""
        return hashlib.sha256(self.content).hexdigest() if self.large else git_hash(self.content)

    def listing(self, path: str) -> dict[str, Any]:
        """The file as a listing has it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.large:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.oid}\nsize {len(self.content)}\n"
            entry["lfs"] = {"oid": self.oid, "size": len(self.content), "pointerSize": len(pointer)}
            entry["oid"] = git_hash(pointer.encode())
        return entry


@dataclass
class Commit:
    """A state of a repository."""

    files: dict[str, Blob]
    parent: str | None
    title: str


@dataclass
class Repository:
    """Commits, and the branches, tags and pull requests that name them."""

    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit(MAIN, {".gitattributes": Blob(b"*.safetensors filter=lfs\n")}, "initial commit")

    def commit(self, ref: str, files: dict[str, Blob], title: str) -> str:
        """Move a ref to a new commit."""
        parent = self.refs.get(ref)
        content = [self.id, title, parent, time.time_ns(), sorted((p, b.oid) for p, b in files.items())]
        sha = hashlib.sha1(json.dumps(content).encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = Commit(files, parent, title)
        self.refs[ref] = sha
        return sha

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def resolve(self, revision: str) -> str:
        """The commit that a revision names."""
        ref = self.ref(revision)
        sha = self.refs[ref] if ref else next((c for c in self.commits if c == revision), None)
        if sha is None:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def card(self, sha: str) -> dict[str, Any]:
        """The metadata of the card."""
        blob = self.commits[sha].files.get("README.md", Blob(b""))
        found = re.match(r"---\n(.*?)\n---", blob.content.decode(), re.S)
        return yaml.safe_load(found[1]) if found else {}


class FakeHub:
    """The server.

    Attributes:
        url: its address, for HF_ENDPOINT.
        repos: repositories by id.
        faults: what goes wrong next.
        log: the requests so far.

    Example:
        >>> hub = FakeHub().start()
        >>> hub.create("user/tiny").id
        'user/tiny'
        >>> hub.stop()
    """

    def __init__(self, port: int = 0):
        self.repos: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[Entry] = []
        self.connections: set[socket.socket] = set()
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = urlunsplit(("http", f"127.0.0.1:{self.server.server_address[1]}", "", "", ""))

    def start(self) -> "FakeHub":
        """Serve in a thread."""
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Answer no more, on connections that are open either."""
        self.server.shutdown()
        self.server.server_close()
        with self.lock:
            for connection in self.connections:
                with suppress(OSError):  # the client may have closed it
                    connection.shutdown(socket.SHUT_RDWR)

    def create(self, repo_id: str, private: bool = False, gated: bool = False) -> Repository:
        """Make a repository."""
        self.repos[repo_id] = Repository(repo_id, private, gated)
        return self.repos[repo_id]

    def files(self, repo_id: str, revision: str = "main") -> dict[str, str]:
        """Hash of every file: SHA-256 of large ones, git's SHA-1 of the others."""
        return {path: blob.oid for path, blob in self._files(repo_id, revision).items()}

    def read(self, repo_id: str, path: str, revision: str = "main") -> bytes:
        """Content of a file."""
        return self._files(repo_id, revision)[path].content

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        """The commits of a revision, newest first."""
        repo, found = self.repos[repo_id], []
        sha: str | None = repo.resolve(revision)
        while sha:
            found.append(sha)
            sha = repo.commits[sha].parent
        return found

    def add_hostile_entry(self, repo_id: str, path: str) -> None:
        """Put a file under a path that no honest repository has, into the listing and what is served."""
        self._files(repo_id, "main")[path] = Blob(b"evil\n")

    def take_fault(self, method: str, path: str, kind: Callable[[Fault], bool]) -> Fault | None:
        """The first fault of a kind that is meant for a request; it counts as used."""
        with self.lock:
            for fault in self.faults:
                meant = fault.method in (None, method) and re.search(fault.path, path)
                if fault.times > 0 and meant and kind(fault):
                    fault.times -= 1
                    return fault
        return None

    def _files(self, repo_id: str, revision: str) -> dict[str, Blob]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)].files


class Handler(BaseHTTPRequestHandler):
    """One connection; a method per address in `ROUTES`."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for the client's acknowledgement

    def setup(self) -> None:
        super().setup()
        with self.hub.lock:
            self.hub.connections.add(self.connection)

    def finish(self) -> None:
        with self.hub.lock:
            self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        """Keep quiet; `FakeHub.log` has it all."""

    def handle_any(self) -> None:
        """Answer a request, or do what a fault says."""
        address = urlsplit(self.path)
        self.query = parse_qs(address.query, keep_blank_values=True)
        self.route_path, self.body = unquote(address.path), b""
        cut = None
        if self.command not in ("GET", "HEAD"):
            cut = self.hub.take_fault(self.command, self.route_path, lambda f: f.after_bytes is not None)
        try:
            if cut:
                self.record(None)
                self.rfile.read(min(cut.after_bytes, int(self.headers.get("Content-Length") or 0)))
                self.hang_up()
            else:
                self.body = self.read_body()
                self.answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has hung up

    def record(self, status: int | None) -> None:
        """Log the request, before its answer: a client that has the answer finds it in the log."""
        entry = Entry(self.command, self.path, status, dict(self.headers), self.body[:BODY_KEPT])
        with self.hub.lock:
            self.hub.log.append(entry)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def hang_up(self) -> None:
        """Close the connection in the middle of what it was for."""
        self.close_connection = True
        self.connection.shutdown(2)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self) -> None:
        """Find the route, and turn a refusal into its answer."""
        fault = self.hub.take_fault(self.command, self.route_path, lambda f: f.status is not None)
        if fault:
            self.send(fault.status, {"error": f"fault {fault.status}"}, fault.headers)
            return
        try:
            self.user = self.user_of_token()
            for methods, pattern, function in ROUTES:
                found = re.fullmatch(pattern, self.route_path)
                if found and self.command in methods:
                    function(self, *found.groups())
                    return
            raise RefusalError(404, message=f"no route {self.command} {self.route_path}")
        except RefusalError as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self.send(refusal.status, {"error": refusal.message}, {k: v for k, v in headers.items() if v})

    def send(self, status: int | None, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        """Answer with bytes or with JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.record(status)
        self.send_response(status or 500)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # --- who may do what ---------------------------------------------------------------------------------------------

    def user_of_token(self) -> str | None:
        header = self.headers.get("Authorization", "")
        if not header:
            return None
        user = TOKENS.get(header.removeprefix("Bearer "))
        if user is None:
            raise RefusalError(401, message="Invalid user token.")
        return user

    def signed_in(self) -> str:
        if self.user is None:
            raise RefusalError(401, message="Invalid username or password.")
        return self.user

    def readable(self, repo_id: str) -> Repository:
        """A repository that the user may see; a private one is hidden from others as if it did not exist."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo_id.split("/")[-2]):
            raise RefusalError(401 if self.user is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def writable(self, repo_id: str) -> Repository:
        self.signed_in()
        repo = self.readable(repo_id)
        if self.user != repo_id.split("/")[-2]:
            raise RefusalError(403, message="You don't have the rights to write to this repo")
        return repo

    # --- accounts and repositories -----------------------------------------------------------------------------------

    def whoami(self) -> None:
        self.send(
            200, {"type": "user", "name": self.signed_in(), "orgs": [], "auth": {"type": "access_token"}}
        )

    def validate_yaml(self) -> None:
        found = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.S)
        errors = []
        try:
            metadata = yaml.safe_load(found[1]) if found else {}
            if not isinstance(metadata.get("tags", []), list):
                errors.append({"message": '"tags" must be an array'})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self.send(400 if errors else 200, {"errors": errors, "warnings": []})

    def create_repository(self) -> None:
        user, wanted = self.signed_in(), json.loads(self.body)
        owner = wanted.get("organization") or user
        repo_id = f"{owner}/{wanted['name']}"
        address = {"url": f"{self.hub.url}/{repo_id}"}
        if owner != user:
            raise RefusalError(
                403, message="You don't have the rights to create a model under this namespace"
            )
        with self.hub.lock:
            if repo_id in self.hub.repos:
                self.send(409, {"error": "You already created this model repo", **address})
                return
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.create(repo_id, private=bool(private))
        self.send(200, address)

    def repository_info(self, repo_id: str, revision: str = "main") -> None:
        repo = self.readable(repo_id)
        sha = repo.resolve(revision)
        files, card = repo.commits[sha].files, repo.card(sha)
        info = {
            "id": repo_id,
            "sha": sha,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "tags": list(card.get("tags") or []),
            "siblings": [{"rfilename": path} for path in sorted(files)],
            "cardData": json.loads(json.dumps(card, default=str)),
            "lastModified": DATE,
            "createdAt": DATE,
        }
        info |= {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
        self.send(200, info)

    def tree(self, repo_id: str, revision: str, folder: str | None = None) -> None:
        sha = self.readable(repo_id).resolve(revision)
        files = self.hub.repos[repo_id].commits[sha].files
        prefix = f"{folder}/" if folder else ""
        inside = {path: blob for path, blob in sorted(files.items()) if path.startswith(prefix)}
        if folder and not inside:
            raise RefusalError(404, "EntryNotFound", f"{folder} does not exist")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries, folders = [], set()
        for path, blob in inside.items():
            steps = path.removeprefix(prefix).split("/")
            if len(steps) > 1 and steps[0] not in folders:
                folders.add(steps[0])
                entries.append(
                    {"type": "directory", "path": prefix + steps[0], "size": 0, "oid": git_hash(b"")}
                )
            if recursive or len(steps) == 1:
                entries.append(blob.listing(path))
        self.send(200, entries, {"X-Repo-Commit": sha})

    def paths_info(self, repo_id: str, revision: str) -> None:
        repo = self.readable(repo_id)
        files = repo.commits[repo.resolve(revision)].files
        wanted = parse_qs(self.body.decode()).get("paths", [])
        self.send(200, [files[path].listing(path) for path in wanted if path in files])

    def refs(self, repo_id: str) -> None:
        repo = self.readable(repo_id)

        def named(prefix: str) -> list[dict[str, str]]:
            found = {ref: sha for ref, sha in repo.refs.items() if ref.startswith(prefix)}
            return [{"name": r.removeprefix(prefix), "ref": r, "targetCommit": s} for r, s in found.items()]

        lists = {"branches": named("refs/heads/"), "tags": named("refs/tags/"), "converts": []}
        self.send(200, {**lists, "pullRequests": named("refs/pr/")})

    def history(self, repo_id: str, revision: str) -> None:
        repo = self.readable(repo_id)
        shas = self.hub.commits(repo_id, revision)
        self.send(
            200,
            [
                {"id": sha, "title": repo.commits[sha].title, "message": "", "date": DATE, "authors": []}
                for sha in shas
            ],
        )

    def branch(self, repo_id: str, name: str) -> None:
        repo = self.writable(repo_id)
        if f"refs/heads/{name}" in repo.refs:
            raise RefusalError(409, message="Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repo.refs[f"refs/heads/{name}"] = repo.resolve(start)
        self.send(200, {})

    def tag(self, repo_id: str, revision: str) -> None:
        repo, name = self.writable(repo_id), f"refs/tags/{json.loads(self.body)['tag']}"
        if name in repo.refs:
            raise RefusalError(409, message="Tag reference exists already")
        repo.refs[name] = repo.resolve(revision)
        self.send(200, {})

    # --- writing -----------------------------------------------------------------------------------------------------

    def preupload(self, repo_id: str, revision: str) -> None:
        self.signed_in()
        repo = self.readable(repo_id) if self.query.get("create_pr") else self.writable(repo_id)
        ref = repo.ref(revision)
        files = repo.commits[repo.refs[ref]].files if ref else {}
        answer = []
        for file in json.loads(self.body)["files"]:
            large = file["size"] > LARGE_BYTES or any(fnmatch(file["path"], pattern) for pattern in LARGE)
            known = files[file["path"]].oid if file["path"] in files else None
            mode = "lfs" if large else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self.send(200, {"files": answer})

    def large_batch(self, repo_id: str) -> None:
        self.signed_in()
        self.readable(repo_id)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/_lfs/{wanted['oid']}", "header": {}},
                "verify": {"href": f"{self.hub.url}/_lfs_verify", "header": {}},
            }
            there = wanted["oid"] in self.hub.large_files
            objects.append(
                {"oid": wanted["oid"], "size": wanted["size"]} | ({} if there else {"actions": actions})
            )
        self.send(200, {"transfer": "basic", "objects": objects})

    def large_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(400, message="sha mismatch")
        self.hub.large_files[oid] = self.body
        self.send(200)

    def large_verify(self) -> None:
        wanted = json.loads(self.body)
        there = len(self.hub.large_files.get(wanted["oid"], b"")) == wanted["size"]
        self.send(200 if there else 404, {})

    def commit(self, repo_id: str, revision: str) -> None:
        create_pr, user = bool(self.query.get("create_pr")), self.signed_in()
        repo = self.readable(repo_id) if create_pr else self.writable(repo_id)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.hub.lock:
            ref = repo.ref(revision)
            if ref is None or ref.startswith("refs/tags/"):
                raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            if header.get("parentCommit") not in (None, repo.refs[ref]):
                raise RefusalError(412, message="A commit has happened since. Please refresh and try again.")
            files = dict(repo.commits[repo.refs[ref]].files)
            for line in lines:
                self.apply(files, line["key"], line["value"])
            answer: dict[str, Any] = {}
            if create_pr:
                number = len(repo.pulls) + 1
                repo.refs[f"refs/pr/{number}"] = repo.refs[ref]
                ref = f"refs/pr/{number}"
                repo.pulls.append(
                    {"num": number, "title": header["summary"], "status": "open", "author": user}
                )
                answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
            sha = repo.commit(ref, files, header["summary"])
        self.send(200, {**answer, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        """Do one line of a commit."""
        if key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.large_files:
                raise RefusalError(400, message=f"LFS object {value['oid']} not uploaded")
            files[value["path"]] = Blob(self.hub.large_files[value["oid"]], large=True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise RefusalError(404, "EntryNotFound", "A file with this name doesn't exist")
        elif key == "deletedFolder":
            for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
                del files[path]

    def merge(self, repo_id: str, number: str) -> None:
        repo = self.writable(repo_id)
        pull = repo.pulls[int(number) - 1]
        repo.commit(MAIN, repo.commits[repo.refs[f"refs/pr/{number}"]].files, pull["title"])
        pull["status"] = "merged"
        self.send(200, {"newStatus": "merged"})

    # --- downloading -------------------------------------------------------------------------------------------------

    def file(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.readable(repo_id)
        sha = repo.resolve(revision)
        if repo.gated and self.user != repo_id.split("/")[-2]:
            raise RefusalError(
                401 if self.user is None else 403, "GatedRepo", f"Access to model {repo_id} is restricted."
            )
        blob = repo.commits[sha].files.get(path)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob is None:
            refusal = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **headers}
            self.send(404, {"error": "Entry not found"}, refusal)
            return
        headers["ETag"] = f'"{blob.oid}"'
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        self.send_content(blob.content, headers)

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        """Send a file or the range that was asked for, or as much of it, or as wrong, as a fault says."""
        status, asked = 200, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            if first >= len(content):
                raise RefusalError(416, message="range")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        if self.command == "GET":
            if content and self.hub.take_fault("GET", self.route_path, lambda fault: fault.corrupt):
                content = bytes([content[0] ^ 1]) + content[1:]
            cut = self.hub.take_fault("GET", self.route_path, lambda fault: fault.after_bytes is not None)
            if cut:
                self.send(
                    status, content[: cut.after_bytes], {**headers, "Content-Length": str(len(content))}
                )
                self.wfile.flush()
                self.hang_up()
                return
        self.send(status, content, headers)


_REPO = r"/api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)"
_REVISION = r"(refs/pr/\d+|[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", "/api/repos/create", Handler.create_repository),
    ("GET", _REPO, Handler.repository_info),
    ("GET", f"{_REPO}/revision/(.+)", Handler.repository_info),
    ("GET", f"{_REPO}/tree/{_REVISION}(?:/(.*))?", Handler.tree),
    ("POST", f"{_REPO}/paths-info/(.+)", Handler.paths_info),
    ("GET", f"{_REPO}/refs", Handler.refs),
    ("GET", f"{_REPO}/commits/(.+)", Handler.history),
    ("POST", f"{_REPO}/branch/(.+)", Handler.branch),
    ("POST", f"{_REPO}/tag/(.+)", Handler.tag),
    ("POST", f"{_REPO}/preupload/(.+)", Handler.preupload),
    ("POST", f"{_REPO}/commit/(.+)", Handler.commit),
    ("POST", rf"{_REPO}/discussions/(\d+)/merge", Handler.merge),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.large_batch),
    ("PUT", "/_lfs/([0-9a-f]{64})", Handler.large_put),
    ("POST", "/_lfs_verify", Handler.large_verify),
    ("GET HEAD", rf"/((?:datasets/)?[^/]+/[^/]+)/(?:resolve|raw)/{_REVISION}/(.+)", Handler.file),
]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8421)
    served = FakeHub(parser.parse_args().port)
    print(f"export HF_ENDPOINT={served.url} HF_TOKEN=hf_fake_admin HF_HUB_DISABLE_XET=1", flush=True)
    served.server.serve_forever()
