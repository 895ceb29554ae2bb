"""A small Hub on the loopback: models and Spaces in memory, for tests of loading and pushing.

It answers what huggingface_hub asks of the real one for creating repositories, committing (large
files by LFS), reading at any revision, private visibility and pull requests. It does not have
xet, multipart uploads or the permissions of organisations.
"""

import base64
import fnmatch
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

USER, TOKEN = "tester", "hf_loopback"
LFS_ENDINGS = (".safetensors", ".png", ".bin", ".pt")
DATE = "2026-01-01T00:00:00.000Z"


class Refusal(Exception):
    """An answer that is an error; `code` tells huggingface_hub which of its exceptions it is."""

    def __init__(self, status: int, code: str, message: str, body: dict | None = None, **headers):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **(body or {})}
        self.headers = {"X-Error-Code": code, "X-Error-Message": message, **headers}


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]
    parent: str | None = None


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, message: str, files: dict[str, bytes], parent: str | None = None) -> Commit:
        text = f"{len(self.commits)} {message} {sorted(files)} {parent}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), message, files, parent)
        self.commits.append(commit)
        return commit

    def at(self, revision: str) -> Commit:
        oid = self.refs.get(revision, revision)
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")


class LoopbackHub:
    """Use as `hub = LoopbackHub()`, with `HF_ENDPOINT=hub.url` and `HF_TOKEN=hub.token` set before
    huggingface_hub is imported.

    `repos` holds what is there, Spaces as "spaces/you/name". While `fail_on` is a
    regular expression, requests whose "METHOD /path" it matches are answered with an error, and
    `log` holds those that were not.
    """

    token = TOKEN

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.fail_on: str | None = None
        self.log: list[str] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository, without the `.gitattributes` that every one has."""
        files = self.repos[repo_id].at(revision).files
        return {name: data for name, data in files.items() if name != ".gitattributes"}

    # ---- what the routes do: each returns JSON ---------------------------------------------------

    def who_am_i(self, request):
        request.need_token()
        return {"type": "user", "name": USER, "fullname": USER, "orgs": [{"name": "org"}],
                "auth": {"accessToken": {"role": "write", "displayName": "test"}}}  # fmt: skip

    def create(self, request):
        request.need_token()
        body = request.json()
        repo_id = f"{body.get('organization') or USER}/{body['name']}"
        if repo_id.split("/")[0] not in (USER, "org"):
            raise Refusal(403, "Forbidden", "you have no right to create this repository")
        answer = {"name": repo_id, "id": repo_id}
        if body.get("type") == "space":
            if body.get("sdk") not in ("gradio", "docker", "static"):
                raise Refusal(400, "BadRequest", "a Space needs an sdk")
            repo_id = f"spaces/{repo_id}"
        answer["url"] = f"{self.url}/{repo_id}"
        if repo_id in self.repos:
            raise Refusal(409, "RepoExists", "You already created this repository", answer)
        is_private = bool(body.get("private")) or body.get("visibility") == "private"
        repo = self.repos[repo_id] = Repo(is_private)
        repo.refs["main"] = repo.add("initial commit", {".gitattributes": b"*.png -text\n"}).oid
        return answer

    def info(self, request, repo_id, revision="main"):
        repo = request.repo(repo_id)
        commit = repo.at(revision)
        name = repo_id.removeprefix("spaces/")
        return {
            "_id": name, "id": name, "modelId": name, "author": name.split("/")[0],
            "sha": commit.oid, "lastModified": DATE, "createdAt": DATE, "private": repo.private,
            "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
            "siblings": [{"rfilename": name} for name in sorted(commit.files)],
        }  # fmt: skip

    def preupload(self, request, repo_id, revision):
        """Which files to send by LFS, and which the repository's `.gitignore` leaves out."""
        request.need_token()
        body, commit = request.json(), request.repo(repo_id).at(revision)
        ignored = body.get("gitIgnore", "").split()
        return {
            "commitOid": commit.oid,
            "files": [
                {
                    "path": file["path"],
                    **_known(file["path"], commit.files),
                    "uploadMode": "lfs" if file["path"].endswith(LFS_ENDINGS) else "regular",
                    "shouldIgnore": any(_is_ignored(file["path"], line) for line in ignored),
                }
                for file in body["files"]
            ],
        }

    def lfs_batch(self, request, repo_id):
        objects = []
        for body in request.json()["objects"]:
            answer = {"oid": body["oid"], "size": body["size"]}
            if body["oid"] not in self.lfs:
                upload = {"href": f"{self.url}/lfs/{body['oid']}", "header": {}}
                answer["actions"] = {"upload": upload}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def lfs_upload(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise Refusal(400, "BadRequest", "these are other bytes")
        self.lfs[oid] = request.body
        return {}

    def commit(self, request, repo_id, revision):
        if "create_pr" in request.query:
            request.need_token()
        else:
            self.may_write(request, repo_id)
        repo = request.repo(repo_id)
        parent, message = repo.at(revision), ""
        files = dict(parent.files)
        for line in request.body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.lfs[value["oid"]]
            elif kind == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise Refusal(400, "BadRequest", f"no such operation here: {kind}")
        made = repo.add(message, files, parent.oid)
        answer = {"commitOid": made.oid, "commitUrl": f"{self.url}/{repo_id}/commit/{made.oid}"}
        if "create_pr" in request.query:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            repo.refs[f"refs/pr/{number}"] = made.oid
            return answer | {"pullRequestUrl": f"{self.url}/{repo_id}/discussions/{number}"}
        repo.refs[revision] = made.oid
        return answer

    def branch(self, request, repo_id, name):
        request.need_token()
        repo = request.repo(repo_id)
        repo.refs[name] = repo.at((request.json() or {}).get("startingPoint", "main")).oid
        return {}

    def tree(self, request, repo_id, revision, path=""):
        files, prefix = request.repo(repo_id).at(revision).files, f"{path}/" if path else ""
        return [_describe(name, data) for name, data in files.items() if name.startswith(prefix)]

    def paths_info(self, request, repo_id, revision):
        files = request.repo(repo_id).at(revision).files
        body = request.json()["paths"]
        return [_describe(name, files[name]) for name in body if name in files]

    def may_write(self, request, repo_id):
        """The user reads every organization, and writes to one."""
        request.need_token()
        request.repo(repo_id)
        if repo_id.removeprefix("spaces/").split("/")[0] not in (USER, "org"):
            raise Refusal(403, "Forbidden", f"you have no right to write to {repo_id}")
        return {}

    def validate_card(self, request):
        return {"errors": [], "warnings": []}


ROUTES = [
    ("GET", r"/api/whoami-v2", LoopbackHub.who_am_i),
    ("POST", r"/api/repos/create", LoopbackHub.create),
    ("POST", r"/api/validate-yaml", LoopbackHub.validate_card),
    ("GET", r"/api/{kind}{repo}", LoopbackHub.info),
    ("GET", r"/api/{kind}{repo}/auth-check/write", LoopbackHub.may_write),
    ("GET", r"/api/{kind}{repo}/revision/(?P<revision>.+)", LoopbackHub.info),
    ("POST", r"/api/{kind}{repo}/preupload/(?P<revision>.+)", LoopbackHub.preupload),
    ("POST", r"/api/{kind}{repo}/commit/(?P<revision>.+)", LoopbackHub.commit),
    ("POST", r"/api/{kind}{repo}/branch/(?P<name>.+)", LoopbackHub.branch),
    ("POST", r"/api/{kind}{repo}/paths-info/(?P<revision>.+)", LoopbackHub.paths_info),
    ("GET", r"/api/{kind}{repo}/tree/{revision}(?:/(?P<path>.*))?", LoopbackHub.tree),
    ("POST", r"/{repo}\.git/info/lfs/objects/batch", LoopbackHub.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", LoopbackHub.lfs_upload),
]
_KIND, _REPO = r"(?:models/|(?=spaces/))", r"(?P<repo_id>(?:spaces/)?[\w.-]+/[\w.-]+)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *arguments):
        pass

    def need_token(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Unauthorized", "Invalid username or password.")

    def repo(self, repo_id: str) -> Repo:
        """A private repository is not there for those without the token."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or repo.private:
            try:
                self.need_token()
            except Refusal as refusal:
                raise Refusal(401, "RepoNotFound", "Repository not found") from refusal
        if repo is None:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return repo

    def json(self):
        return json.loads(self.body) if self.body else None

    def handle_request(self):
        url = urlparse(self.path)
        path, self.query, self.body = unquote(url.path), parse_qs(url.query), self._read()
        with self.hub.lock:
            try:
                if self.hub.fail_on and re.search(self.hub.fail_on, f"{self.command} {path}"):
                    raise Refusal(400, "Down", "the Hub is down")  # a 500 would be tried again
                self.hub.log.append(f"{self.command} {path}")
                self._answer(path)
            except Refusal as refusal:
                self._send(refusal.status, json.dumps(refusal.body).encode(), refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _answer(self, path: str):
        for method, pattern, answer in ROUTES:
            for name, form in (("{kind}", _KIND), ("{repo}", _REPO), ("{revision}", _REVISION)):
                pattern = pattern.replace(name, form)
            if method == self.command and (match := re.fullmatch(pattern, path)):
                arguments = {name: value for name, value in match.groupdict().items() if value}
                return self._send(200, json.dumps(answer(self.hub, self, **arguments)).encode(), {})
        if self.command in ("GET", "HEAD") and (
            match := re.fullmatch(f"/{_REPO}/resolve/{_REVISION}/(?P<name>.+)", path)
        ):
            return self._resolve(**match.groupdict())
        raise Refusal(404, "NotImplemented", f"no route for {self.command} {path}")

    def _resolve(self, repo_id: str, revision: str, name: str):
        """The bytes of a file."""
        commit = self.repo(repo_id).at(revision)
        if name not in commit.files:
            missing = f"{name} does not exist"
            raise Refusal(404, "EntryNotFound", missing, **{"X-Repo-Commit": commit.oid})
        data = commit.files[name]
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        self._send(200, data, headers)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _known(name: str, files: dict[str, bytes]) -> dict:
    """The identity of a file that is there, so that one alike need not be sent."""
    if name not in files:
        return {}
    data = files[name]
    if name.endswith(LFS_ENDINGS):
        return {"oid": hashlib.sha256(data).hexdigest()}
    return {"oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}


def _describe(name: str, data: bytes) -> dict:
    oid = hashlib.sha256(data).hexdigest()
    entry = {"type": "file", "oid": oid[:40], "size": len(data), "path": name}
    if name.endswith(LFS_ENDINGS):
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 132}
    return entry


def _is_ignored(path: str, line: str) -> bool:
    if line.endswith("/"):
        return any(fnmatch.fnmatch(folder, line[:-1]) for folder in path.split("/")[:-1])
    return fnmatch.fnmatch(path.split("/")[-1], line)
