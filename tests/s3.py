"""A real S3 server (moto's) on this machine, with read errors and slow reads on demand.

with s3_server(monkeypatch) as s3:            # sets AWS_* for clients in this process and below
    s3.upload(folder, "bucket/dataset")       # then s3://bucket/dataset/...
    s3.fail_every = 3                         # every third GET of an object is a 503
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class S3Server:
    """The faults apply to GET requests of objects; 0 turns one off."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.fail_every = 0  # 503 Slow Down
        self.cut_every = 0  # half of the body, then the connection is closed
        self.slow_seconds = 0.0  # before each body
        self.fetched: list[tuple[str, str]] = []  # (path, Range) of each GET
        self.num_faults = 0
        self._count = itertools.count(1)
        self._lock = threading.Lock()

    def upload(self, folder: Path, where: str) -> str:
        """Copy the files below a folder to bucket/prefix; return the s3:// URL of the prefix."""
        import s3fs

        filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket = where.partition("/")[0]
        if not filesystem.exists(bucket):
            filesystem.mkdir(bucket)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            filesystem.pipe_file(f"{where}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{where}"

    def middleware(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """Wrap moto's WSGI application with the faults."""

        def faulty(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if environ["REQUEST_METHOD"] != "GET" or path.count("/") < 2 or path.endswith("/"):
                return app(environ, start_response)
            with self._lock:
                self.fetched.append((path, environ.get("HTTP_RANGE", "")))
                number = next(self._count)
            time.sleep(self.slow_seconds)
            if self.fail_every and number % self.fail_every == 0:
                self.num_faults += 1
                body = b"<Error><Code>SlowDown</Code><Message>injected</Message></Error>"
                start_response("503 Slow Down", [("Content-Length", str(len(body)))])
                return [body]
            body = b"".join(app(environ, start_response))
            if self.cut_every and number % self.cut_every == 0 and len(body) > 1:
                self.num_faults += 1
                environ["werkzeug.socket"].settimeout(5)
                return _cut(body[: len(body) // 2])
            return [body]

        return faulty


def _cut(body: bytes) -> Iterator[bytes]:
    yield body
    raise ConnectionError("injected")


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Run the server; clients of this process and its children find it by the environment."""
    import s3fs
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any, **__: Any) -> None:
            """Say nothing: requests and injected faults are expected."""

    s3 = S3Server()
    app = s3.middleware(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    s3.endpoint = f"http://127.0.0.1:{server.port}"
    for name, value in {
        "AWS_ENDPOINT_URL": s3.endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",  # the retries under test are ours
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # clients of a server before are kept by fsspec
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        server.shutdown()
        thread.join()
