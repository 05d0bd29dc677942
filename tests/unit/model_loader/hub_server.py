"""A server on 127.0.0.1 that speaks enough of the Hub's API to download a repository from it, badly if asked to."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What is served, how, and what was asked for."""

    repositories: dict[str, Path]
    address: str = ""
    cut_after_bytes: int | None = None
    """Break the next transfers of large files off after so many bytes; see cuts_left."""
    cuts_left: int = 0
    damages: bool = False
    """Serve weights with a wrong byte."""
    ignores_ranges: bool = False
    refuses: int | None = None
    """Answer everything with this status."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, Range header)"""
    sent_bytes: int = 0
    """Of all bodies."""

    def transfers(self, name: str) -> list[str | None]:
        """Range headers of the GET requests for a file."""
        return [wanted for method, path, wanted in self.requests if method == "GET" and path.endswith(name)]


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[Hub]:
    """repositories: folder by name. The address is for `mirror=`."""
    hub = Hub(repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *args: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            path = self.path.split("?")[0]
            hub.requests.append((self.command, path, self.headers.get("Range")))
            if hub.refuses:
                return self._send(hub.refuses, b"{}", with_body)
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
                folder = hub.repositories.get(match.group(1))
                if folder is None:
                    return self._send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})
                listing = _tree(folder) if (match.group(2) or "").startswith("/tree") else _info(match.group(1), folder)
                return self._send(200, json.dumps(listing).encode(), with_body)
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                path_there = hub.repositories[match.group(1)] / match.group(2)
                if path_there.is_file():
                    return self._file(path_there, with_body)
                return self._send(404, b"", with_body, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return self._send(404, b"{}", with_body)

        def _file(self, path: Path, with_body: bool) -> None:
            data = path.read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            start, status, stop = 0, 200, len(data)
            if (wanted := self.headers.get("Range")) and not hub.ignores_ranges:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, status, stop = int(first), 206, min(int(last) + 1 if last else len(data), len(data))
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            body = data[start:stop]
            if hub.damages and path.suffix == ".safetensors":
                body = body[:-1] + bytes([body[-1] ^ 1])
            self._send(status, body, with_body, headers)

        def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if not with_body:
                return
            if hub.cuts_left and hub.cut_after_bytes is not None and len(body) > hub.cut_after_bytes:
                hub.cuts_left -= 1
                self.wfile.write(body[: hub.cut_after_bytes])
                self.wfile.flush()
                self.close_connection = True
                return
            self.wfile.write(body)
            hub.sent_bytes += len(body)

    return Handler


def _info(name: str, folder: Path) -> dict[str, object]:
    files = [{"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]} for entry in _tree(folder)]
    return {"id": name, "modelId": name, "sha": COMMIT, "siblings": files, "private": False, "tags": [], "downloads": 0}


def _tree(folder: Path) -> list[dict[str, object]]:
    return [
        {
            "type": "file",
            "path": path.name,
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.name.encode()).hexdigest(),
        }
        for path in sorted(folder.iterdir())
    ]
