"""What stand_in.py asks: forks ranks with everything imported into the nodes' namespaces.

    warm.start("tests.slurm.warm_ranks", [SOCKET])

One keeper a rank, on this machine: it starts the rank, hands signals on, kills it where the
stand-in is gone, and says how it ended. A rank is named after this server and its job.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from tests import warm
from tests.slurm.stand_in import NAMESPACES

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_MAX_REQUEST = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def _name(server: int, job: str, rank: int | str) -> str:
    return f"{server}-{job}-{rank}"  # the kernel keeps 15 characters


def find_ranks(server: int, job: str, rank: int | str = "") -> list[int]:
    """Return the process ids (of this machine) of a job's warm ranks, or of one of them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/comm"):
        try:
            name = file.read_text().strip()
        except OSError:  # it has just ended
            continue
        if name.startswith(_name(server, job, rank)):
            found.append(int(file.parent.name))
    return found


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, 0):
        raise OSError(ctypes.get_errno(), "setns")


def _keep(client: socket.socket, server: int) -> NoReturn:
    """Start the rank that a stand-in asks for, and be between them until one of them ends."""
    data, files, _, _ = socket.recv_fds(client, _MAX_REQUEST, 2 + len(NAMESPACES))
    stdout, stderr, pid_namespace, *others = files
    request = json.loads(data)
    _enter(pid_namespace)  # holds for children alone
    rank = os.fork()
    if not rank:
        client.close()
        environment = request["environment"]
        name = _name(server, environment["SLURM_JOB_ID"], environment["RANK"])
        _libc.prctl(_PR_SET_NAME, name.encode())
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for namespace in others:
            _enter(namespace)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        for descriptor in files:
            os.close(descriptor)
        warm.become(request)
    for descriptor in files:
        os.close(descriptor)
    end = os.pidfd_open(rank)
    with selectors.DefaultSelector() as ready:
        ready.register(client, selectors.EVENT_READ)
        ready.register(end, selectors.EVENT_READ)
        while end not in {key.fileobj for key, _ in ready.select()}:
            number = client.recv(16)
            os.kill(rank, int(number or signal.SIGKILL))
            if not number:  # the stand-in is gone
                ready.unregister(client)
    _, status = os.waitpid(rank, 0)
    try:
        client.send(str(os.waitstatus_to_exitcode(status)).encode())
    finally:
        os._exit(0)


def main() -> None:
    """Fork a keeper for each stand-in, until killed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(sys.argv[1])
        listener.listen()
        while True:
            client, _ = listener.accept()
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                _keep(client, os.getppid())
            client.close()


if __name__ == "__main__":
    main()
