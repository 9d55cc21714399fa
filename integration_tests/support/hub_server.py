# SPDX-License-Identifier: Apache-2.0
"""A small Hub on loopback: repositories, branches, pull requests, large files, tokens and faults, all in memory.

It speaks as much of the Hub's HTTP protocol as `huggingface_hub` needs to push and pull models, and answers
everything else with 501. `HF_ENDPOINT` must point to it before `huggingface_hub` is imported, so clients run in
processes of their own; `environment()` is what they need.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LARGE = (".safetensors", ".png", ".bin")
LIFETIME = 300.0  # seconds after which a forgotten server stops by itself
OWNER, READER = "hf_owner", "hf_reader"
_KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
_REPO = r"(?P<kind>models|datasets|spaces)/(?P<repo>[^/]+/[^/]+)"


@dataclasses.dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """As the Hub gives it: SHA-256 of large files, git's SHA-1 of the others."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclasses.dataclass
class Repo:
    """A repository; a commit is its id and its files."""

    kind: str
    private: bool
    commits: dict[str, dict[str, Blob]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, Blob]) -> str:
        text = f"{len(self.commits)} {ref} {sorted((path, blob.oid) for path, blob in files.items())}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        sha = self.resolve(revision)
        return {} if sha is None else {path: blob.data for path, blob in self.commits[sha].items()}


@dataclasses.dataclass
class Fault:
    """Answers the next `times` requests whose "METHOD path" matches `pattern` with an error, or calls `action`."""

    pattern: str
    status: int = 500
    message: str = "out of order"
    times: int = 1
    action: Callable[[], None] | None = None


class HubServer(ThreadingHTTPServer):
    """The server and what it stores; tests read and write the attributes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.large_files: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.quota: int | None = None  # bytes of large files
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, cache: object, token: str | None = OWNER) -> dict[str, str]:
        """Environment of a client process."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def add(self, name: str, files: dict[str, bytes | str], *, kind: str = "model", private: bool = False) -> Repo:
        """Puts a repository on the Hub."""
        repo = self.repos[name] = Repo(kind, private)
        data = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        repo.commit("main", {path: Blob(content, path.endswith(LARGE)) for path, content in data.items()})
        return repo

    def uploads(self) -> int:
        """Large files that were sent so far."""
        return sum(request.startswith("PUT /large/") for request in self.requests)


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """Runs a server for the length of the block."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    deadline = threading.Timer(LIFETIME, server.shutdown)
    deadline.daemon = True
    thread.start()
    deadline.start()
    try:
        yield server
    finally:
        deadline.cancel()
        server.shutdown()
        thread.join(timeout=5)
        server.server_close()


class _Answer(Exception):  # noqa: N818 - ends a handler, as an error or not
    def __init__(self, status: int, body: Any = "", **headers: str) -> None:
        super().__init__(status)
        self.status = status
        self.body = body
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: pytest prints what matters."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _serve(self) -> None:
        address = urlsplit(self.path)
        # Sizes are bounded by what the client announces; the client is a test.
        self.content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.content = self._read_chunks()
        self.query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        request = f"{self.command} {unquote(address.path)}"
        try:
            with self.server.lock:
                self.server.requests.append(request)
                fault = next((f for f in self.server.faults if f.times > 0 and re.search(f.pattern, request)), None)
                if fault is not None:
                    fault.times -= 1
            if fault is not None and fault.action is not None:
                fault.action()
            elif fault is not None:
                raise _Answer(fault.status, {"error": fault.message}, X_Error_Message=fault.message)
            with self.server.lock:
                self._route(address.path)
            raise _Answer(501, {"error": f"{request} is not part of this Hub"})
        except _Answer as answer:
            self._send(answer)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _read_chunks(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _send(self, answer: _Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        kind = "application/octet-stream" if isinstance(answer.body, bytes) else "application/json"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(answer.status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    # --- who asks -----------------------------------------------------------------------------------------------

    @property
    def token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _require_write(self) -> None:
        if self.token not in (OWNER, READER):
            message = "Invalid username or password."
            raise _Answer(401, {"error": message}, X_Error_Message=message)
        if self.token != OWNER:
            message = "You don't have the rights to write to this namespace"
            raise _Answer(403, {"error": message}, X_Error_Message=message)

    def _repo(self, kind: str, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or repo.kind != _KINDS[kind] or (repo.private and self.token != OWNER):
            raise _Answer(404 if self.token else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return repo

    def _sha(self, repo: Repo, revision: str) -> str:
        sha = repo.resolve(unquote(revision))
        if sha is None:
            raise _Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        return sha

    # --- what is asked ------------------------------------------------------------------------------------------

    def _route(self, path: str) -> None:
        for methods, pattern, serve in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and self.command in methods:
                serve(self, **match.groupdict())

    def _create(self) -> None:
        self._require_write()
        wanted = json.loads(self.content)
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        existing = self.server.repos.get(name)
        if existing is not None:
            message = f"You already created this {existing.kind} repo: {name}"
            raise _Answer(409, {"error": message, "url": f"{self.server.url}/{name}"}, X_Error_Message=message)
        if name.split("/")[0] != "user":
            raise _Answer(403, {"error": f"no rights under {name}"}, X_Error_Message="no rights in this namespace")
        repo = self.server.repos[name] = Repo(wanted.get("type") or "model", wanted.get("visibility") == "private")
        repo.commit("main", {})
        raise _Answer(200, {"url": f"{self.server.url}/{name}", "name": name})

    def _validate_yaml(self) -> None:
        raise _Answer(200, {"errors": [], "warnings": []})

    def _info(self, kind: str, repo: str, revision: str = "main") -> None:
        found = self._repo(kind, repo)
        sha = self._sha(found, revision)
        names = sorted(found.commits[sha])
        body = {
            "_id": sha,
            "id": repo,
            "modelId": repo,
            "sha": sha,
            "private": found.private,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": name} for name in names],
        }
        raise _Answer(200, body)

    def _tree(self, kind: str, repo: str, revision: str) -> None:
        found = self._repo(kind, repo)
        files = []
        for name, blob in sorted(found.commits[self._sha(found, revision)].items()):
            entry: dict[str, Any] = {"type": "file", "path": name, "oid": blob.oid, "size": len(blob.data)}
            if blob.large:
                entry["lfs"] = {"oid": blob.oid, "size": len(blob.data), "pointerSize": 130}
            files.append(entry)
        raise _Answer(200, files)

    def _branch(self, kind: str, repo: str, revision: str) -> None:
        self._require_write()
        found = self._repo(kind, repo)
        name = unquote(revision)
        if name in found.refs:
            raise _Answer(409, {"error": "Reference already exists"})
        found.refs[name] = found.refs["main"]
        raise _Answer(200, {})

    def _preupload(self, kind: str, repo: str, revision: str) -> None:
        found = self._writable(kind, repo)
        current = found.commits[self._sha(found, revision)]
        files = []
        for file in json.loads(self.content)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if file["path"] in current:
                entry["oid"] = current[file["path"]].oid
            files.append(entry)
        raise _Answer(200, {"files": files})

    def _writable(self, kind: str, repo: str) -> Repo:
        # Whoever may read may open a pull request.
        if self.query.get("create_pr") != "1":
            self._require_write()
        return self._repo(kind, repo)

    def _batch(self, repo: str) -> None:
        objects = json.loads(self.content)["objects"]
        new = {o["oid"]: o["size"] for o in objects if o["oid"] not in self.server.large_files}
        stored = sum(len(data) for data in self.server.large_files.values())
        if self.server.quota is not None and stored + sum(new.values()) > self.server.quota:
            message = "Private repository storage limit reached, please upgrade your plan to increase it."
            raise _Answer(403, {"error": message}, X_Error_Message=message)
        answer = []
        for wanted in objects:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] in new:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/large/{wanted['oid']}"}}
            answer.append(entry)
        raise _Answer(200, {"transfer": "basic", "objects": answer})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.content).hexdigest() != oid:
            raise _Answer(400, {"error": "the content is not what was announced"})
        self.server.large_files[oid] = self.content
        raise _Answer(200, {})

    def _commit(self, kind: str, repo: str, revision: str) -> None:
        found = self._writable(kind, repo)
        parent = self._sha(found, revision)
        files = dict(found.commits[parent])
        for line in self.content.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header" and value.get("parentCommit") not in (None, parent):
                raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            if item["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.large_files:
                    raise _Answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = Blob(self.server.large_files[value["oid"]], large=True)
            elif item["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                raise _Answer(404, {"error": "A file with this name doesn't exist"}, X_Error_Code="EntryNotFound")
        body = {"success": True}
        ref = unquote(revision)
        if self.query.get("create_pr") == "1":
            number = 1 + sum(name.startswith("refs/pr/") for name in found.refs)
            ref = f"refs/pr/{number}"
            body["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/{number}"
        sha = found.commit(ref, files)
        raise _Answer(200, {**body, "commitOid": sha, "commitUrl": f"{self.server.url}/{repo}/commit/{sha}"})

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._repo("models", repo)
        sha = self._sha(found, revision)
        blob = found.commits[sha].get(unquote(path))
        if blob is None:
            raise _Answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        raise _Answer(200, blob.data, ETag=f'"{blob.oid}"', X_Repo_Commit=sha, Accept_Ranges="bytes")


_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("POST",), r"/api/repos/create", _Handler._create),
    (("POST",), r"/api/validate-yaml", _Handler._validate_yaml),
    (("GET",), rf"/api/{_REPO}", _Handler._info),
    (("GET",), rf"/api/{_REPO}/revision/{_REVISION}", _Handler._info),
    (("GET",), rf"/api/{_REPO}/tree/{_REVISION}", _Handler._tree),
    (("POST",), rf"/api/{_REPO}/branch/{_REVISION}", _Handler._branch),
    (("POST",), rf"/api/{_REPO}/preupload/{_REVISION}", _Handler._preupload),
    (("POST",), rf"/api/{_REPO}/commit/{_REVISION}", _Handler._commit),
    (("POST",), r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler._batch),
    (("PUT",), r"/large/(?P<oid>[0-9a-f]{64})", _Handler._put),
    (("GET", "HEAD"), rf"/(?P<repo>[^/]+/[^/]+)/resolve/{_REVISION}/(?P<path>.+)", _Handler._resolve),
]
