"""A hub of ours for the tests of uploads and downloads, as huggingface_hub and datasets ask for them.

Repositories, the plan of an upload, LFS files and commits; lists of files, their heads and contents. One revision each, `main`.

Runs in the test's process; the tested command is a process of its own, pointed here by HF_ENDPOINT. `refuses` maps a
part of the address ("create", "preupload", "batch", "commit") to the status that it answers instead.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote

TOKEN = "hf_test"


class StubHub:
    """A context manager. url: its address. repos: name -> visibility, files and commits. sent: the addresses asked for.
    cards: those that it was asked to validate. card_fault: what it finds wrong with them.
    """

    def __init__(self, **refuses: int) -> None:
        self.refuses = refuses
        self.repos: dict[str, dict[str, Any]] = {}
        self.sent: list[str] = []
        self.cards: list[dict[str, str]] = []
        self.card_fault = ""
        self._blobs: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> StubHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, token: str = TOKEN) -> dict[str, str]:
        """The variables that point a process here. Xet's storage has no stub: files go the LFS way."""
        here = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return {**here, "HF_TOKEN": token} if token else here

    def add(self, name: str, files: dict[str, bytes], *, kind: str = "model", visibility: str = "public") -> None:
        """Put a repository there."""
        self.repos[name] = {"visibility": visibility, "kind": kind, "files": dict(files), "commits": ["first"]}

    def commit_of(self, name: str) -> str:
        """The commit of a repository: another one for other files."""
        files = self.repos[name]["files"]
        return hashlib.sha1(repr(sorted((path, content) for path, content in files.items())).encode()).hexdigest()

    def entries(self, name: str) -> list[dict[str, Any]]:
        """The files and folders of a repository."""
        files = self.repos[name]["files"]
        folders = {str(above) for path in files for above in PurePosixPath(path).parents} - {"."}
        return [
            *({"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)),
            *(
                {"type": "file", "path": path, "oid": hashlib.sha1(content).hexdigest(), "size": len(content)}
                for path, content in sorted(files.items())
            ),
        ]

    def create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.url}/{'datasets/' if asked.get('type') == 'dataset' else ''}{name}"
        if name in self.repos:
            return 409, {"url": url, "error": "You already created this repo"}
        kind = asked.get("type") or "model"
        self.repos[name] = {"visibility": asked.get("visibility"), "kind": kind, "files": {}, "commits": []}
        return 200, {"url": url}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        repo = self.repos[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo["commits"].append(value["summary"])
            elif line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo["files"][value["path"]] = self._blobs[value["oid"]]

    def keep(self, oid: str, content: bytes) -> None:
        assert hashlib.sha256(content).hexdigest() == oid
        self._blobs[oid] = content


def _handler(hub: StubHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            if "/resolve/" in self.path:
                self._read()
            else:
                self._say(200, {})

        def do_GET(self) -> None:
            self._read()

        def _read(self) -> None:
            parts = unquote(self.path.partition("?")[0]).split("/")[
                1:
            ]  # api/models/owner/name/..., [datasets/]owner/name/resolve/...
            api = parts[0] == "api"
            kind = parts[1] if api else parts[0] if parts[0] == "datasets" else "models"
            rest = parts[2:] if api else parts[1:] if kind == "datasets" else parts
            name, rest = "/".join(rest[:2]), rest[2:]
            repo = hub.repos.get(name)
            public = repo is not None and repo["visibility"] == "public"
            if self._refused(open_to_all=public):
                return
            if repo is None or repo["kind"] != kind.removesuffix("s"):
                self._say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return
            commit = hub.commit_of(name)
            if len(rest) > 1 and rest[1] not in ("main", commit):
                self._say(404, {"error": f"Invalid rev id: {rest[1]}"}, {"X-Error-Code": "RevisionNotFound"})
            elif rest[:1] == ["resolve"]:
                self._file(repo["files"].get("/".join(rest[2:])), commit)
            elif rest[:1] == ["tree"]:
                below = "/".join(rest[2:])
                self._say(200, [one for one in hub.entries(name) if one["path"].startswith(below)])
            elif rest[:1] in ([], ["revision"]):
                siblings = [{"rfilename": path} for path in sorted(repo["files"])]
                private = repo["visibility"] == "private"
                self._say(200, {"id": name, "private": private, "sha": commit, "siblings": siblings, "tags": []})
            else:
                self._say(404, {"error": f"no such path: {self.path}"})

        def _file(self, content: bytes | None, commit: str) -> None:
            if content is None:
                self._say(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_PUT(self) -> None:
            hub.keep(self.path.rpartition("/")[2], self._body())
            self._say(200, {})

        def do_POST(self) -> None:
            body = self._body()
            if self._refused(open_to_all="/paths-info/" in self.path):
                return
            path = self.path.partition("?")[0]
            parts = path.split("/")
            if path == "/api/repos/create":
                self._say(*hub.create(json.loads(body)))
            elif "paths-info" in parts:
                asked = parse_qs(body.decode())["paths"]
                self._say(200, [one for one in hub.entries("/".join(parts[3:5])) if one["path"] in asked])
            elif path == "/api/validate-yaml":
                hub.cards.append(json.loads(body))
                fault = {"errors": [{"message": hub.card_fault}], "warnings": []}
                self._say(400, fault) if hub.card_fault else self._say(200, {"errors": [], "warnings": []})
            elif "preupload" in parts:
                files = json.loads(body)["files"]
                plan = [
                    {"path": f["path"], "shouldIgnore": False, "oid": None,
                     "uploadMode": "lfs" if f["path"].endswith((".safetensors", ".parquet")) else "regular"}
                    for f in files
                ]  # fmt: skip
                self._say(200, {"files": plan})
            elif path.endswith("/info/lfs/objects/batch"):
                objects = [
                    {
                        "oid": one["oid"],
                        "size": one["size"],
                        "actions": {"upload": {"href": f"{hub.url}/blob/{one['oid']}"}},
                    }
                    for one in json.loads(body)["objects"]
                ]
                self._say(200, {"transfer": "basic", "objects": objects})
            elif "commit" in parts:
                name = "/".join(parts[3:5])
                hub.commit(name, [json.loads(line) for line in body.splitlines()])
                url = f"{hub.url}/{name}/commit/{'1' * 40}"
                self._say(200, {"success": True, "commitUrl": url, "commitOid": "1" * 40})
            else:
                self._say(404, {"error": f"no such path: {path}"})

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _refused(self, *, open_to_all: bool = False) -> bool:
            hub.sent.append(f"{self.command} {self.path}")
            for part, status in hub.refuses.items():
                if part in self.path:
                    self._say(status, {"error": f"told to refuse {part}"})
                    return True
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not open_to_all:
                hidden = {"X-Error-Code": "RepoNotFound"} if self.command in ("GET", "HEAD") else None
                self._say(401, {"error": "Invalid username or password."}, hidden)
                return True
            return False

        def _say(self, status: int, tree: Any, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(tree).encode()
            self.send_response(status)
            for key, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **(headers or {}),
            }.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler
