"""A stand-in for the Hub on this machine: the part of its interface by which repositories are made and filled.

It keeps what it was sent, and what it was asked in which order. (PYTEST_DONT_REWRITE: there are no tests in here.)
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlparse

TOKEN = "hf_of_me"


class Hub:
    """Who is logged in by TOKEN, each repository's files, which are private, and the requests so far."""

    def __init__(self) -> None:
        self.user = {
            "name": "me",
            "orgs": [{"name": "readers", "roleInOrg": "read"}, {"name": "us", "roleInOrg": "write"}],
            "auth": {"accessToken": {"role": "write"}},
        }
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}  # by SHA-256, as they come before a commit
        self.requests: list[str] = []
        self.fails_at = ""  # a part of a path, from which on nothing is taken
        self.endpoint = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        """Status and JSON for a request of one who is logged in."""
        parts = path.strip("/").split("/")
        if self.fails_at and self.fails_at in path:
            return 403, {"error": "not for you"}
        if method == "HEAD":
            return 200, {}
        if path == "/api/whoami-v2":
            return 200, self.user
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if parts[0] == "stored":
            assert hashlib.sha256(body).hexdigest() == parts[1]
            self.large[parts[1]] = body
            return 200, {}
        if parts[:2] == ["api", "models"]:
            return self.of_repository("/".join(parts[2:4]), parts[4], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"objects": [self.place_for(each) for each in json.loads(body)["objects"]]}
        return 404, {"error": f"the stand-in knows no {method} {path}"}

    def create(self, asked: dict) -> tuple[int, object]:
        repo = f"{asked['organization'] or self.user['name']}/{asked['name']}"
        if repo in self.repositories:
            return 409, {"error": "there is one", "url": f"{self.endpoint}/{repo}"}
        self.repositories[repo] = {".gitattributes": b""}
        if asked.get("visibility") == "private":
            self.private.add(repo)
        return 200, {"url": f"{self.endpoint}/{repo}"}

    def place_for(self, described: dict) -> dict:
        href = f"{self.endpoint}/stored/{described['oid']}"
        return described | {"actions": {"upload": {"href": href}}}

    def of_repository(self, repo: str, what: str, body: bytes) -> tuple[int, object]:
        if repo not in self.repositories:
            return 404, {"error": "Repository not found"}
        files = self.repositories[repo]
        if what == "tree":
            return 200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in files]
        if what == "preupload":
            asked = json.loads(body)["files"]
            modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in asked}
            return 200, {
                "files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            }
        assert what == "commit"
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        return 200, {"commitUrl": f"{self.endpoint}/{repo}/commit/1", "commitOid": "1" * 40}


@contextmanager
def served(hub: Hub) -> Iterator[None]:
    """Have the stand-in answer at `hub.endpoint`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            path = urlparse(self.path).path
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {path}")
            is_open = self.command == "HEAD" or path.startswith("/stored/")
            is_known = is_open or self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, content = hub.answer(self.command, path, body) if is_known else (401, {"error": "who are you?"})
            sent = json.dumps(content).encode()
            self.send_response(status)
            if status >= 400:
                self.send_header("X-Error-Message", content["error"])
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(sent)

        do_GET = do_POST = do_PUT = do_HEAD = answer

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
