"""A Hub in memory, on 127.0.0.1: the endpoints that the installed `huggingface_hub` uses to push and to load a model.

It knows repositories (private ones too), branches, commits, pull requests, LFS files and tokens; it writes down every
request; it can be told to fail. It has no Xet storage: set `HF_HUB_DISABLE_XET`, or the client looks for it.
"""

from __future__ import annotations

import base64
import fnmatch
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote

DROP = 0  # a "status": the connection is closed without an answer

_REPO = r"(?P<repo>[\w.\-]+/[\w.\-]+)"
_REV = r"(?P<rev>[^/]+)"
ROUTES = [
    (name, method, re.compile(pattern))
    for name, method, pattern in [
        ("whoami", "GET", "/api/whoami-v2"),
        ("create_repo", "POST", "/api/repos/create"),
        ("validate_card", "POST", "/api/validate-yaml"),
        ("info", "GET", rf"/api/models/(?P<repo>[\w.\-]+(?:/[\w.\-]+)?)(?:/revision/{_REV})?"),
        ("tree", "GET", rf"/api/models/{_REPO}/tree/{_REV}(?:/(?P<folder>.+))?"),
        ("branch", "POST", rf"/api/models/{_REPO}/branch/{_REV}"),
        ("preupload", "POST", rf"/api/models/{_REPO}/preupload/{_REV}"),
        ("commit", "POST", rf"/api/models/{_REPO}/commit/{_REV}"),
        ("lfs_batch", "POST", rf"/{_REPO}\.git/info/lfs/objects/batch"),
        ("lfs_put", "PUT", rf"/lfs/{_REPO}/(?P<oid>\w+)"),
        ("lfs_verify", "POST", rf"/lfs/{_REPO}/verify"),
        ("resolve", "(?:GET|HEAD)", rf"/{_REPO}/resolve/{_REV}/(?P<path>.+)"),
    ]
]

WRITER, READER, OTHER = (f"hf_{name}{'0123456789abcdef' * 2}" for name in ("Write", "Read", "Other"))


@dataclass(frozen=True)
class Blob:
    """The content of a file, and whether it is kept as LFS."""

    content: bytes
    lfs: bool = False

    @property
    def oid(self) -> str:
        """What git calls a file, or LFS: also its ETag."""
        if self.lfs:
            return sha256(self.content).hexdigest()
        return sha1(b"blob %d\0" % self.size + self.content).hexdigest()

    @property
    def size(self) -> int:
        return len(self.content)


@dataclass(frozen=True)
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A repository: its commits by id, and the branches that point to them."""

    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def add(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        oid = sha1(f"{len(self.commits)} {branch} {title}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def at(self, revision: str) -> Commit:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


@dataclass(frozen=True)
class User:
    """Whom a token stands for, and whether it may write to that user's repositories."""

    name: str
    writes: bool = True


@dataclass
class Request:
    """What came in, and what was answered."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    endpoint: str = "unknown"
    status: int = DROP

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        own = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.reply = Reply(status, json.dumps({"error": message}).encode(), own | headers)


@dataclass
class Failure:
    """An error to answer with, some number of times; only after the work is done, if `late`."""

    status: int
    times: int
    message: str
    late: bool


class HubServer:
    """The Hub. `with HubServer({"hf_...": User("me")}) as hub: ... hub.url ...`"""

    def __init__(self, tokens: dict[str, User]) -> None:
        self.tokens = tokens
        self.repos: dict[str, Repo] = {}
        self.log: list[Request] = []
        self._failures: dict[str, Failure] = {}
        self._before: dict[str, Callable[[], object]] = {}
        self._lock = RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> HubServer:
        Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def put(self, repo_id: str, files: dict[str, bytes], branch: str = "main", private: bool = False) -> Repo:
        """Commit `files` as somebody else would, into a repository that is made where there is none."""
        with self._lock:
            repo = self._make(repo_id, private) if repo_id not in self.repos else self.repos[repo_id]
            added = {path: Blob(content, path.endswith((".safetensors", ".bin"))) for path, content in files.items()}
            repo.add(branch, "by somebody else", repo.at(branch).files | added)
            return repo

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.content for path, blob in self.repos[repo_id].at(revision).files.items()}

    def state(self) -> dict[str, tuple[list[str], dict[str, str]]]:
        """Every commit and every branch of every repository."""
        return {repo_id: (list(repo.commits), dict(repo.branches)) for repo_id, repo in self.repos.items()}

    def fail(self, endpoint: str, status: int, said: str = "injected", *, times: int = 99, late: bool = False) -> None:
        """Answer the next `times` requests to `endpoint` with an error. `{authorization}` in what it says is echoed."""
        assert endpoint in {name for name, _, _ in ROUTES}
        self._failures[endpoint] = Failure(status, times, said, late)

    def before(self, endpoint: str, action: Callable[[], object]) -> None:
        """Do something once, right before the next request to `endpoint` is answered."""
        self._before[endpoint] = action

    def asked(self, endpoint: str) -> list[Request]:
        return [request for request in self.log if request.endpoint == endpoint]

    def answer(self, request: Request) -> Reply:
        with self._lock:
            try:
                reply = self._answer(request)
            except Refusal as refusal:
                reply = refusal.reply
            request.status = reply.status
            self.log.append(request)
            return reply

    def _answer(self, request: Request) -> Reply:
        fitting = [(name, pattern) for name, verb, pattern in ROUTES if re.fullmatch(verb, request.method)]
        found = ((name, pattern.fullmatch(request.path)) for name, pattern in fitting)
        request.endpoint, match = next(((name, match) for name, match in found if match), ("unknown", None))
        if match is None:
            raise Refusal(404, "Sorry, we can't find the page you are looking for.")
        self._before.pop(request.endpoint, lambda: None)()
        failure = self._failures.get(request.endpoint)
        if failure and failure.times > 0:
            failure.times -= 1
            if failure.late:
                self._route(request, match)
            raise Refusal(failure.status, failure.message.format(**request.headers))
        return self._route(request, match)

    def _route(self, request: Request, match: re.Match[str]) -> Reply:
        found = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
        value = getattr(self, f"_{request.endpoint}")(request, **found)
        return value if isinstance(value, Reply) else Reply(body=json.dumps(value).encode())

    def _user(self, request: Request) -> User | None:
        secret = request.headers.get("authorization", "").removeprefix("Bearer ")
        if secret and secret not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens.get(secret)

    def _readable(self, request: Request, repo_id: str) -> Repo:
        user, repo = self._user(request), self.repos.get(repo_id)
        if repo is None or (repo.private and (user is None or user.name != repo_id.split("/")[0])):
            status, message = (404, "Repository not found") if user else (401, "Invalid username or password.")
            raise Refusal(status, message, "RepoNotFound")
        return repo

    def _writable(self, request: Request, repo_id: str) -> Repo:
        repo = self._readable(request, repo_id)
        self._check_right(self._user(request), repo_id.split("/")[0], "pass `create_pr=1` as a query parameter")
        return repo

    def _check_right(self, user: User | None, namespace: str, hint: str) -> None:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if not user.writes or user.name != namespace:
            raise Refusal(403, f"You don't have the rights to write under the namespace {namespace}, {hint}")

    def _make(self, repo_id: str, private: bool) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.add("main", "initial commit", {".gitattributes": Blob(b"*.safetensors filter=lfs\n")})
        return repo

    # The endpoints, each by its name in ROUTES.

    def _whoami(self, request: Request) -> Any:
        if (user := self._user(request)) is None:
            raise Refusal(401, "Invalid username or password.")
        return {"type": "user", "name": user.name}

    def _create_repo(self, request: Request) -> Any:
        user, asked = self._user(request), request.json
        namespace = asked.get("organization") or (user.name if user else "")
        self._check_right(user, namespace, "create it under your own")
        repo_id = f"{namespace}/{asked['name']}"
        answer = {"url": f"{self.url}/{repo_id}", "id": repo_id}
        if repo_id in self.repos:
            return Reply(409, json.dumps({"error": "You already created this model repo", **answer}).encode())
        self._make(repo_id, asked.get("visibility") == "private")
        return answer

    def _validate_card(self, request: Request) -> Any:
        if "license: unheard-of" in request.json["content"]:
            raise Refusal(400, '"license" must be one of a list')
        return {"errors": [], "warnings": []}

    def _info(self, request: Request, repo: str, rev: str = "main") -> Any:
        commit = self._readable(request, repo).at(rev)
        return {"id": repo, "sha": commit.oid, "private": self.repos[repo].private, "tags": []}

    def _tree(self, request: Request, repo: str, rev: str, folder: str = "") -> Any:
        commit = self._readable(request, repo).at(rev)
        inside = {path: blob for path, blob in commit.files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise Refusal(404, f"{folder} does not exist on {rev}", "EntryNotFound")
        return [
            {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
            | ({"lfs": {"oid": blob.oid, "size": blob.size, "pointerSize": 134}} if blob.lfs else {})
            for path, blob in inside.items()
        ]

    def _branch(self, request: Request, repo: str, rev: str) -> Any:
        writable = self._writable(request, repo)
        if rev in writable.branches:
            raise Refusal(409, f"Reference already exists: {rev}")
        writable.branches[rev] = writable.at(request.json.get("startingPoint", "main")).oid
        return {}

    def _preupload(self, request: Request, repo: str, rev: str) -> Any:
        pull = "create_pr" in request.query
        files = (self._readable if pull else self._writable)(request, repo).at(rev).files
        ignored = request.json.get("gitIgnore", files.get(".gitignore", Blob(b"")).content.decode()).split()
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if path.endswith((".safetensors", ".bin")) else "regular",
                    "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
                    **({"oid": files[path].oid} if path in files else {}),
                }
                for path in (file["path"] for file in request.json["files"])
            ]
        }

    def _lfs_batch(self, request: Request, repo: str) -> Any:
        uploads, base = self._readable(request, repo).uploads, f"{self.url}/lfs/{repo}"
        objects = request.json["objects"]
        for wanted in (wanted for wanted in objects if wanted["oid"] not in uploads):
            upload, verify = {"href": f"{base}/{wanted['oid']}"}, {"href": f"{base}/verify"}
            wanted["actions"] = {"upload": upload, "verify": verify}
        return {"transfer": "basic", "objects": objects}

    def _lfs_put(self, request: Request, repo: str, oid: str) -> Any:
        if sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "the content is not what its name says")
        self.repos[repo].uploads[oid] = request.body
        return Reply(body=b"")

    def _lfs_verify(self, request: Request, repo: str) -> Any:
        if len(self._readable(request, repo).uploads.get(request.json["oid"], b"")) != request.json["size"]:
            raise Refusal(404, "no such object")
        return {}

    def _commit(self, request: Request, repo: str, rev: str) -> Any:
        pull = "create_pr" in request.query
        target = (self._readable if pull else self._writable)(request, repo)
        lines = [json.loads(line) for line in request.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        head = target.at(rev)
        if not pull and header.get("parentCommit", head.oid) != head.oid:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for line in lines:
            _change(files, line["key"], line["value"], target.uploads)
        number = sum(branch.startswith("refs/pr/") for branch in target.branches) + 1
        commit = target.add(f"refs/pr/{number}" if pull else rev, header["summary"], files)
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{self.url}/{repo}/commit/{commit.oid}"}
        return answer | ({"pullRequestUrl": f"{self.url}/{repo}/discussions/{number}"} if pull else {})

    def _resolve(self, request: Request, repo: str, rev: str, path: str) -> Any:
        commit = self._readable(request, repo).at(rev)
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        blob = commit.files[path]
        return Reply(body=blob.content, headers={"ETag": f'"{blob.oid}"', "X-Repo-Commit": commit.oid})


def _change(files: dict[str, Blob], key: str, value: dict[str, Any], uploads: dict[str, bytes]) -> None:
    """One line of a commit."""
    if key == "file":
        files[value["path"]] = Blob(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        if value["oid"] not in uploads:
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
        files[value["path"]] = Blob(uploads[value["oid"]], lfs=True)
    elif key == "deletedFile" and files.pop(value["path"], None) is None:
        raise Refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, has the Hub answer it, and sends that."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or header and body wait for each other
    hub: HubServer

    def _handle(self) -> None:
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", 0)))
        reply = self.hub.answer(Request(self.command, path, parse_qs(query), headers, body))
        if reply.status == DROP:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def log_message(self, *_: object) -> None:
        """Say nothing: the Hub keeps the requests."""
