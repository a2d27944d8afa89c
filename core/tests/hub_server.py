"""A hub on loopback: speaks as much of the interfaces of Hugging Face and ModelScope as their clients ask for."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["Hub", "Repository", "serving"]


@dataclass
class Repository:
    """The files of each revision; `gated` and `private` ones answer only to the token 'good'."""

    revisions: Mapping[str, Mapping[str, bytes]]
    gated: bool = False
    private: bool = False

    def commit(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit stands for."""
        for name, files in self.revisions.items():
            digest = hashlib.sha1(name.encode() + b"".join(files.values())).hexdigest()
            if revision in (name, digest):
                return digest
        return None

    def files(self, revision: str) -> Mapping[str, bytes]:
        commit = self.commit(revision)
        return next(files for name, files in self.revisions.items() if self.commit(name) == commit)


@dataclass
class Hub:
    """What is on the hub, what it was asked for, and how it misbehaves."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    #: Every request for a file's content, as (method, path in the repository).
    file_requests: list[tuple[str, str]] = field(default_factory=list)
    #: How many more answers for a path break off halfway.
    breaks: dict[str, int] = field(default_factory=dict)
    url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port of 127.0.0.1; its `url` says which."""
    handler = type("HubHandler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        match parts:
            case ["api", "v1", "models", owner, name, *rest]:
                self.modelscope(f"{owner}/{name}", rest, query)
            case ["api", "models", owner, name, ("revision" | "tree") as what, revision]:
                self.hugging_face_listing(f"{owner}/{name}", what, revision)
            case [owner, name, "resolve", revision, *path]:
                self.hugging_face_file(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self.send(404, {})

    # Hugging Face: errors carry their kind in X-Error-Code.

    def hugging_face_listing(self, name: str, what: str, revision: str) -> None:
        if (commit := self.hugging_face_commit(name, revision, listing=True)) is None:
            return
        files = self.hub.repositories[name].files(commit)
        if what == "revision":
            self.send(200, {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]})
            return
        self.send(
            200,
            [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ],
        )

    def hugging_face_file(self, name: str, revision: str, path: str) -> None:
        self.hub.file_requests.append((self.command, path))
        if (commit := self.hugging_face_commit(name, revision, listing=False)) is None:
            return
        content = self.hub.repositories[name].files(commit).get(path)
        if content is None:
            self.send(404, {}, {"X-Error-Code": "EntryNotFound"})
            return
        self.send_file(path, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit})

    def hugging_face_commit(self, name: str, revision: str, listing: bool) -> str | None:
        """The commit, or None where an error has been sent instead."""
        repository = self.hub.repositories.get(name)
        granted = self.headers.get("Authorization") == "Bearer good"
        if repository is None or (repository.private and not granted):
            self.send(401, {"error": "Invalid username or password."}, {"X-Error-Code": "RepoNotFound"})
        elif repository.gated and not granted and not listing:
            self.send(403, {"error": "Access is restricted."}, {"X-Error-Code": "GatedRepo"})
        elif commit := repository.commit(revision):
            return commit
        else:
            self.send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return None

    # ModelScope: one path for the listing, one for every file's content.

    def modelscope(self, name: str, rest: list[str], query: dict[str, str]) -> None:
        repository = self.hub.repositories.get(name)
        revision = query.get("Revision", "master")
        path = query.get("FilePath", "")
        if rest == ["repo"]:
            self.hub.file_requests.append((self.command, path))
        if repository is None or repository.commit(revision) is None:
            self.send(404, {"Code": 10010205001, "Message": "not found", "Success": False})
        elif repository.gated and "m_session_id=good" not in self.headers.get("Cookie", ""):
            self.send(403, {"Code": 10010201003, "Message": "no permission", "Success": False})
        elif rest == ["repo", "files"]:
            files = repository.files(revision).items()
            self.send(200, {"Code": 200, "Data": {"Files": [_listed(path, content) for path, content in files]}})
        elif rest == ["repo"] and path in repository.files(revision):
            self.send_file(path, repository.files(revision)[path], {})
        else:
            self.send(404, {"Code": 404, "Message": "not found", "Success": False})

    def send_file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        status, total, start = 200, len(content), 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            status, content = 206, content[start:]
            headers = {**headers, "Content-Range": f"bytes {start}-{total - 1}/{total}"}
        self.head(status, len(content), {**headers, "Accept-Ranges": "bytes"})
        if self.command == "HEAD":
            return
        if self.hub.breaks.get(path, 0):
            self.hub.breaks[path] -= 1
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content)

    def send(self, status: int, body: object, headers: Mapping[str, str] = {}) -> None:
        text = json.dumps(body).encode()
        self.head(status, len(text), {**headers, "Content-Type": "application/json"})
        if self.command != "HEAD":
            self.wfile.write(text)

    def head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _listed(path: str, content: bytes) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    return {"Path": path, "Name": path.rsplit("/")[-1], "Type": "blob", "Size": len(content), "Sha256": digest}
