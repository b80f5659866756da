"""Real servers on loopback that tests read from: HTTP with byte ranges and faults, and S3."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# drop: close in the middle of the answer; stall: answer too late; 503, 429, 404, 403; whole: ignore Range; drip: a byte
# at a time; endless: never stop sending
Fault = str


@dataclass
class Files:
    """A folder served over HTTP; the next requests that end in a name meet its faults, one each."""

    folder: Path
    url: str = ""
    stall_s: float = 3.0
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)
    down: bool = False
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self, name: str) -> Fault | None:
        with self._guard:
            self.requests[name] += 1
            planned = self.faults.get(name, [])
            return planned.pop(0) if planned else None


def _handler(files: Files) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            name = self.path.rsplit("/", 1)[-1]
            fault = "503" if files.down else files.next_fault(name) if body else None
            path = files.folder / name
            if (fault is not None and fault.isdigit()) or not path.is_file():
                return self._plain(int(fault or 404))
            if fault == "stall":
                time.sleep(files.stall_s)
            if fault in ("drip", "endless"):
                return self._pour(b"x" if fault == "drip" else b"x" * 65536, 0.3 if fault == "drip" else 0)
            content, status = path.read_bytes(), 200
            total = len(content)
            span = self.headers.get("Range")
            if span and fault != "whole":
                first, last = span.removeprefix("bytes=").split("-")
                content, status = content[int(first) : int(last) + 1], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Accept-Ranges", "bytes")
            if status == 206:
                self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
            self.end_headers()
            if body:
                self.wfile.write(content[: len(content) // 2] if fault == "drop" else content)
            if fault == "drop":
                self.close_connection = True

        def _pour(self, piece: bytes, pause: float) -> None:
            self.send_response(200)
            self.end_headers()
            self.close_connection = True
            with suppress(OSError):  # until the reader has had enough
                while True:
                    self.wfile.write(piece)
                    time.sleep(pause)

        def _plain(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


@contextmanager
def served_files(folder: Path) -> Iterator[Files]:
    """Serve ``folder`` on a free port of loopback."""
    files = Files(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(files))
    server.daemon_threads = True
    files.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def served_bucket(folder: Path) -> Iterator[str]:
    """An S3 server whose bucket ``pages`` holds the files of ``folder`` under ``set``; yields their URL."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket="pages")
        for path in folder.iterdir():
            client.upload_file(str(path), "pages", f"set/{path.name}")
        yield "s3://pages/set"
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
