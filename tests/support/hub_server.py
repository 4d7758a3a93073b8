"""A Hub for tests: the routes that huggingface_hub uses to push and to download, over a dictionary of repositories.

`Hub()` is a context manager around a server on a free port. Weights go the way of large files (batch, PUT, verify),
everything else into the commit. `token` is the one it takes; `writable` the owner that this token may write to.
`cut` breaks the connection in the middle of a request whose path contains that text; `read_only` forbids every commit.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN, OWNER = "hf_testtoken", "me"
_NAME = re.compile(r"[\w.-]{1,96}")


@dataclass
class Repository:
    """Commits of a repository, the last at the end: each is the files by path."""

    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"commit {len(self.commits)}".encode()).hexdigest()


class Hub:
    """The server; `url` is for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.token, self.writable, self.cut, self.read_only = TOKEN, OWNER, "", False
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}  # large files by their sha256
        self.requests: list[tuple[str, str]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, message: str, **more: str) -> None:
        super().__init__(message)
        self.status, self.more = status, more


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self._read_route)

    def do_HEAD(self) -> None:
        self._answer(self._read_route)

    def do_POST(self) -> None:
        self._answer(self._write_route)

    def do_PUT(self) -> None:
        self._answer(self._write_route)

    def _answer(self, route: Any) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        if self.hub.cut and self.hub.cut in path:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
        try:
            route(path, body)
        except _Refused as refused:
            content = json.dumps({"error": str(refused), **refused.more}).encode()
            self._send(refused.status, content, {"X-Error-Message": str(refused)})

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            raise _Refused(401, "Invalid credentials in Authorization header")

    def _repository(self, name: str) -> Repository:
        if name not in self.hub.repositories:
            raise _Refused(404, "Repository not found")
        return self.hub.repositories[name]

    def _write_route(self, path: str, body: bytes) -> None:
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.startswith("/upload/"):  # the href is a signed address: no token
            self.hub.uploads[path.removeprefix("/upload/")] = body
            return self._send(200, b"")
        self._check_token()
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/(.+)/preupload/[^/]+", path):
            self._repository(match[1])
            files = [item["path"] for item in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith((".safetensors", ".pt", ".bin")) else "regular" for name in files}
            answers = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            return self._json({"files": answers})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [self._lfs_object(match[1], item) for item in json.loads(body)["objects"]]
            return self._json({"transfer": "basic", "objects": objects})
        if re.fullmatch(r"/(.+)\.git/info/lfs/verify", path):
            return self._json({})
        if match := re.fullmatch(r"/api/models/(.+)/commit/[^/]+", path):
            return self._commit(match[1], [json.loads(line) for line in body.splitlines() if line])
        raise _Refused(404, f"no route {path}")

    def _create(self, wanted: dict[str, Any]) -> None:
        owner, name = wanted.get("organization") or OWNER, wanted["name"]
        if owner != self.hub.writable:
            raise _Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        if not _NAME.fullmatch(name):
            raise _Refused(400, f"Invalid repo name: {name}")
        full = f"{owner}/{name}"
        url = f"{self.hub.url}/{full}"
        if full in self.hub.repositories:
            raise _Refused(409, "You already created this model repo", url=url)
        self.hub.repositories[full] = Repository(
            "private" in (wanted.get("visibility"), wanted.get("private") and "private")
        )
        self._json({"url": url, "name": full})

    def _lfs_object(self, name: str, item: dict[str, Any]) -> dict[str, Any]:
        verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/verify"}
        upload = {"href": f"{self.hub.url}/upload/{item['oid']}"}
        return {**item, "authenticated": True, "actions": {"upload": upload, "verify": verify}}

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repository = self._repository(name)
        if self.hub.read_only:
            raise _Refused(403, "This token may only read")
        files = dict(repository.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
        repository.commits.append(files)
        url = f"{self.hub.url}/{name}/commit/{repository.sha}"
        self._json({"success": True, "commitOid": repository.sha, "commitUrl": url, "hookOutput": ""})

    def _read_route(self, path: str, _: bytes) -> None:
        if match := re.fullmatch(r"/api/models/(.+?)/tree/[^/]+", path):
            files = self._repository(match[1]).files
            tree = [{"type": "file", "path": n, "size": len(b), "oid": _oid(b)} for n, b in files.items()]
            return self._json(tree)
        if match := re.fullmatch(r"/api/models/(.+?)(/revision/[^/]+)?", path):
            repository = self._repository(match[1])
            names = [{"rfilename": name} for name in repository.files]
            return self._json(
                {
                    "id": match[1],
                    "modelId": match[1],
                    "sha": repository.sha,
                    "siblings": names,
                    "private": False,
                    "tags": [],
                }
            )
        if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            repository = self._repository(match[1])
            if match[3] not in repository.files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repository.sha})
            content = repository.files[match[3]]
            return self._send(200, content, {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": repository.sha})
        raise _Refused(404, f"no route {path}")


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
