"""A hub on the loopback: the endpoints that huggingface_hub asks for a model, and the ways in which they fail."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Commit = dict[str, bytes]


@dataclass
class Repo:
    """Attributes:
    commits: commit -> its files. refs: branch or tag -> commit.
    refusal: (status, X-Error-Code, X-Error-Message) of every answer.
    token: needed for every file, as for gated repositories, of which anyone may read the listing.
    breaks: file -> how many bytes of each of the coming answers are sent before the connection is cut.
    """

    commits: dict[str, Commit]
    refs: dict[str, str]
    refusal: tuple[int, str, str] | None = None
    token: str | None = None
    breaks: dict[str, list[int]] = field(default_factory=dict)


def commit_of(files: Commit) -> str:
    digest = hashlib.sha1(usedforsecurity=False)
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name])
    return digest.hexdigest()


def repo(files: Commit, **more: object) -> Repo:
    commit = commit_of(files)
    return Repo({commit: files}, {"main": commit}, **more)  # type: ignore[arg-type]


@dataclass
class Hub:
    """Attributes:
    endpoint: its URL. repos: by id. asked: "METHOD path [range]" of every request, in order.
    """

    endpoint: str
    repos: dict[str, Repo] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """Files of which bytes were asked for, with the range if there was one."""
        found = [re.fullmatch(r"GET /[^/]+/[^/]+/resolve/\w+/(.+)", line) for line in self.asked]
        return [match[1] for match in found if match]


@contextmanager
def serve() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        return None

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = urlsplit(self.path).path
        given = self.headers.get("Range")
        hub.asked.append(f"{self.command} {unquote(path)}" + (f" {given}" if given else ""))
        match = re.fullmatch(
            r"(/api/models)?/([^/]+/[^/]+)(?:/(revision|tree|refs|resolve)(?:/([^/]+)(?:/(.*))?)?)?", path
        )
        found = hub.repos.get(match[2]) if match else None
        if match is None or found is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if found.refusal:
            return self._refuse(*found.refusal)
        if found.token and match[3] == "resolve" and self.headers.get("authorization") != f"Bearer {found.token}":
            return self._refuse(401, "GatedRepo", f"Access to model {match[2]} is restricted.")
        self._found(found, match[2], match[3] or "revision", unquote(match[4] or "main"), unquote(match[5] or ""))

    def _found(self, repo: Repo, name: str, what: str, revision: str, file: str) -> None:
        if what == "refs":
            refs = [{"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": at} for ref, at in repo.refs.items()]
            return self._json({"branches": refs, "tags": [], "converts": []})
        commit = repo.refs.get(revision, revision)
        files = repo.commits.get(commit)
        if files is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what == "revision":
            siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
            return self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})
        if what == "tree":
            return self._json(
                [{"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in files.items()]
            )
        if file not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        return self._file(repo, commit, file, files[file])

    def _file(self, repo: Repo, commit: str, name: str, data: bytes) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        self.send_response(206 if match else 200)
        self.send_header("ETag", f'"{_etag(data)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if match:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = repo.breaks.get(name)
        if cuts:
            self.wfile.write(data[start : start + cuts.pop(0)])
            self.close_connection = True  # fewer bytes than were promised
        else:
            self.wfile.write(data[start:])

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _etag(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
