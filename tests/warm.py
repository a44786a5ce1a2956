"""Real processes of `python -m MODULE`, without the ten seconds of imports each.

    process = warm.start("tests.pretrain.scripts.train", ["run.yaml"], RANK="0")
    output, _ = process.communicate(timeout=600)

One server a test session imports what most processes import (torch, deepspeed, open_clip; nothing
is computed, no thread started) and forks at each request. A child has its own pid, session,
environment, files and signals as a new interpreter would; what it imported is the same. Not for
tests of the start itself.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
_PRELOADED = (
    "pretrain.train",
    "tools.commands.pretrain",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # with torch's compiler: every engine imports it
)
_MAX_REQUEST = 1 << 20


class WarmProcess:
    """What tests use of subprocess.Popen; stderr goes where stdout goes unless `split`."""

    def __init__(self, pid: int, server: _Server, stdout: IO[str], stderr: IO[str] | None) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self._server = server

    @property
    def returncode(self) -> int | None:
        return self._server.codes.get(self.pid)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """Return the exit code, minus the signal's number where one ended it."""
        with self._server.ended:
            if not self._server.ended.wait_for(lambda: self.returncode is not None, timeout):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        code = self.returncode
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Return all of stdout and stderr, after the end; the process is killed at the timeout."""
        watch = threading.Timer(timeout, self.kill)
        watch.start()
        errors: list[str] = []
        reader = None
        if self.stderr is not None:
            stream = self.stderr
            reader = threading.Thread(target=lambda: errors.append(stream.read()))
            reader.start()
        output = self.stdout.read()
        if reader is not None:
            reader.join()
        self.wait(timeout)
        watch.cancel()
        return output, "".join(errors)


class _Server:
    """The server seen from the tests: one socket; a thread that reads its answers."""

    def __init__(self) -> None:
        self.codes: dict[int, int] = {}
        self.ended = threading.Condition()
        self._started: list[int] = []
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.warm", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # outlives a killed group of tests, to clear up after it
        )
        theirs.close()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while answer := self._socket.recv(_MAX_REQUEST):
            message = json.loads(answer)
            with self.ended:
                if "code" in message:
                    self.codes[message["pid"]] = message["code"]
                else:
                    self.codes.pop(message["pid"], None)  # a number used again
                    self._started.append(message["pid"])
                self.ended.notify_all()

    def start(self, request: dict[str, Any], files: list[int]) -> int:
        with self.ended:
            socket.send_fds(self._socket, [json.dumps(request).encode()], files)
            if not self.ended.wait_for(lambda: self._started, timeout=300):
                raise RuntimeError("the server of warm processes does not answer")
            return self._started.pop()


_server: _Server | None = None


def start(
    module: str,
    arguments: list[str],
    *,
    cwd: Path | None = None,
    split: bool = False,
    **environment: str,
) -> WarmProcess:
    """Start `python -m MODULE ARGUMENTS` in its own session; with `split`, stderr apart."""
    global _server
    if _server is None:
        _server = _Server()
    out, stdout = os.pipe()
    err, stderr = os.pipe() if split else (None, os.dup(stdout))
    request = {
        "module": module,
        "arguments": arguments,
        "cwd": str(cwd or Path.cwd()),
        "environment": {**os.environ, **environment},
    }
    pid = _server.start(request, [stdout, stderr])
    os.close(stdout)
    os.close(stderr)
    return WarmProcess(
        pid, _server, os.fdopen(out, encoding="utf-8"), err and os.fdopen(err, encoding="utf-8")
    )


def run(
    module: str, arguments: list[str], *, timeout: float = 600, **options: Any
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with stdout and stderr captured as text."""
    process = start(module, arguments, split=True, **options)
    output, errors = process.communicate(timeout)
    return subprocess.CompletedProcess([module, *arguments], process.wait(), output, errors)


def _serve(requests: socket.socket) -> dict[str, Any]:
    """Fork at each request; return the request in the child, and never in the server."""
    alarm, wakeup = socket.socketpair()
    for end in (alarm, wakeup):
        end.setblocking(False)
    signal.set_wakeup_fd(wakeup.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    with selectors.DefaultSelector() as ready:
        ready.register(requests, selectors.EVENT_READ)
        ready.register(alarm, selectors.EVENT_READ)
        while True:
            chosen = {key.fileobj for key, _ in ready.select()}
            if alarm in chosen:
                alarm.recv(4096)
                for pid in list(children):
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        children.discard(pid)
                        code = os.waitstatus_to_exitcode(status)
                        requests.send(json.dumps({"pid": pid, "code": code}).encode())
            if requests in chosen:
                data, files, _, _ = socket.recv_fds(requests, _MAX_REQUEST, 2)
                if not data:  # the tests are over
                    for pid in children:
                        with suppress(ProcessLookupError):
                            os.killpg(pid, signal.SIGKILL)
                    os._exit(0)
                pid = os.fork()
                if not pid:
                    os.setsid()
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    os.dup2(files[0], 1)
                    os.dup2(files[1], 2)
                    for descriptor in (*files, alarm.detach(), wakeup.detach(), requests.detach()):
                        os.close(descriptor)
                    return dict(json.loads(data))
                for descriptor in files:
                    os.close(descriptor)
                children.add(pid)
                requests.send(json.dumps({"pid": pid}).encode())


def become(request: dict[str, Any]) -> NoReturn:
    """Run what a request asks for as `python -m MODULE ARGUMENTS`, and end this process."""
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    os.chdir(request["cwd"])
    warnings.simplefilter("ignore")
    sys.argv = [request["module"], *request["arguments"]]
    os._exit(_run_as_main(request["module"]))


def _main() -> None:
    for name in _PRELOADED:
        __import__(name)
    gc.freeze()
    become(_serve(socket.socket(fileno=int(sys.argv[1]))))


def _run_as_main(module: str) -> int:
    """Run a module as python -m does; return the exit code, after threads and exit functions.

    What is left out of the interpreter's end is the taking apart of a thousand modules: two
    seconds.
    """
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code or 0


if __name__ == "__main__":
    _main()
