"""A hub in this process, for the real clients of another: models, datasets, revisions and pushes, all in memory.

A client finds it by `HF_ENDPOINT`, which huggingface_hub and datasets read when they are imported.
"""

from __future__ import annotations

import hashlib
import json
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]
LFS_BYTES = 4096  # larger files are stored by their hash, as the hub does from 10 MB on
TIME = "2026-01-01T00:00:00.000Z"


class LocalHub:
    """Repositories by kind and name, such as `models/org/nome`, and the faults that requests meet."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}  # of each repository, oldest first
        self.tags: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}  # pushed and not yet in a commit
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.refusals: list[tuple[str, int, dict[str, str]]] = []  # for the next requests: part of a path, status, head
        self.cuts: list[tuple[str, int]] = []  # of the next bodies: part of a path, bytes after which one breaks off
        self.endpoint = ""

    def add(self, repository: str, files: dict[str, bytes | str], tag: str = "") -> str:
        """A commit with these files and no others; its hash."""
        data = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        history = self.commits.setdefault(repository, {})
        parts = [str(len(history)), *(f"{path} {sha256(data[path])}" for path in sorted(data))]
        commit = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        history[commit] = data
        if tag:
            self.tags.setdefault(repository, {})[tag] = commit
        return commit

    def find(self, repository: str, revision: str) -> tuple[str, Files] | None:
        history = self.commits[repository]
        commit = list(history)[-1] if revision == "main" else self.tags.get(repository, {}).get(revision, revision)
        return (commit, history[commit]) if commit in history else None

    def fetched(self, path: str) -> int:
        """How often the contents of a file were asked for."""
        return sum(line.startswith("GET ") and line.endswith(path) for line in self.requests)

    @contextmanager
    def running(self) -> Iterator[LocalHub]:
        hub = self

        class Bound(_Answers):
            pass

        Bound.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if len(data) > LFS_BYTES:
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
    return entry


class _Answers(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path = unquote(url.path).strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        for refusal in self.hub.refusals:
            if refusal[0] in path:
                self.hub.refusals.remove(refusal)
                return self.answer({"error": "later"}, refusal[1], refusal[2])
        if "/resolve/" in path:
            return self.file(path)
        if self.command == "PUT":
            self.hub.blobs[path.removeprefix("blobs/")] = sent
            return self.answer({})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.lfs_batch(json.loads(sent))
        if path == "api/repos/create":
            return self.create(json.loads(sent))
        if path == "api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path.startswith(("api/models/", "api/datasets/")):
            return self.repository(path, sent, parse_qs(url.query))
        return self.refuse(404, "NotFound")

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def opened(self, repository: str, revision: str) -> tuple[str, Files] | None:
        """The commit and its files; otherwise the refusal is sent."""
        if repository not in self.hub.commits:
            self.refuse(401, "RepoNotFound")
        elif repository in self.hub.gated:
            self.refuse(403, "GatedRepo")
        elif (found := self.hub.find(repository, revision)) is None:
            self.refuse(404, "RevisionNotFound")
        else:
            return found
        return None

    def repository(self, path: str, sent: bytes, query: dict[str, list[str]]) -> None:
        _, kind, owner, name, *rest = path.split("/")
        repository, what = f"{kind}/{owner}/{name}", rest[0] if rest else "revision"
        if what == "preupload":
            modes = [
                {"path": it["path"], "uploadMode": self.mode(it), "shouldIgnore": False}
                for it in json.loads(sent)["files"]
            ]
            return self.answer({"files": modes})
        if what == "commit":
            return self.commit(repository, sent)
        found = self.opened(repository, rest[1] if rest[1:] else "main")
        if found is None:
            return None
        commit, files = found
        if what == "revision":
            return self.answer(
                {
                    **{"_id": "1", "id": f"{owner}/{name}", "sha": commit, "tags": [], "downloads": 1, "likes": 1},
                    **{"private": self.hub.private.get(repository, False), "gated": False, "disabled": False},
                    **{"lastModified": TIME, "createdAt": TIME, "siblings": [{"rfilename": it} for it in files]},
                }
            )
        if what == "tree":
            below = "/".join(rest[2:]) + "/" if rest[2:] else ""
            paths = [it for it in files if it.startswith(below)]
            folders = {it[: it.index("/", len(below))] for it in paths if "/" in it[len(below) :]}
            if query.get("recursive", ["false"])[0].lower() != "true":
                paths = [it for it in paths if "/" not in it[len(below) :]]
            if not paths and not folders:
                return self.refuse(404, "EntryNotFound")
            entries = [{"type": "directory", "path": it, "size": 0, "oid": "0"} for it in sorted(folders)]
            return self.answer([*entries, *(_entry(it, files[it]) for it in paths)])
        asked = parse_qs(sent.decode()) if not sent.startswith(b"{") else json.loads(sent)
        return self.answer([_entry(it, files[it]) for it in asked.get("paths", []) if it in files])

    def mode(self, file: dict[str, Any]) -> str:
        return "lfs" if file["size"] > LFS_BYTES else "regular"

    def create(self, asked: dict[str, Any]) -> None:
        if not self.headers.get("Authorization"):
            return self.refuse(401, "Unauthorized")
        repository = f"models/{asked['organization'] or 'ana'}/{asked['name']}"
        if repository in self.hub.commits:
            return self.refuse(409, "Exists")
        self.hub.add(repository, {})
        self.hub.private[repository] = asked.get("visibility") == "private" or bool(asked.get("private"))
        return self.answer({"url": f"{self.hub.endpoint}/{repository.removeprefix('models/')}"})

    def lfs_batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {**it, "actions": {"upload": {"href": f"{self.hub.endpoint}/blobs/{it['oid']}", "header": {}}}}
            for it in asked["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, repository: str, sent: bytes) -> None:
        files = dict(list(self.hub.commits[repository].values())[-1])
        for line in map(json.loads, sent.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = self.hub.add(repository, dict(files))
        name = repository.removeprefix("models/")
        self.answer({"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}"})

    def file(self, path: str) -> None:
        repository, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        found = self.opened(repository if repository.startswith("datasets/") else f"models/{repository}", revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            return self.refuse(404, "EntryNotFound")
        data, entry = files[name], _entry(name, files[name])
        begin, end = 0, len(data)
        if asked := self.headers.get("Range", "").removeprefix("bytes="):
            first, last = asked.split("-")
            begin, end = int(first), min(end, int(last) + 1) if last else end
        self.send_response(206 if asked else 200)
        headers = {"ETag": f'"{entry.get("lfs", entry)["oid"]}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": headers["ETag"]}
        if asked:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        for key, value in {**headers, "Content-Length": str(end - begin)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        for cut in self.hub.cuts:
            if cut[0] in path and cut[1] < end - begin:
                self.hub.cuts.remove(cut)
                self.wfile.write(data[begin : begin + cut[1]])
                self.close_connection = True
                self.connection.close()
                return
        self.wfile.write(data[begin:end])
