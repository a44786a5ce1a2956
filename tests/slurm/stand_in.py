"""Python as jobs of test_pretraining.py call it: what trains stands in for a warm process.

    PAIRMILL_PYTHON=FILE    where FILE is: exec PYTHON -m tests.slurm.stand_in FILE "$@"

Everything runs in this interpreter, as ever, but for `-m tools.cli`: ten seconds of imports each, a
dozen times. That is asked of warm_ranks.py, which forks a process with all of it imported into this
node's namespaces and into this environment and folder. This process, which slurmd's step and the
launcher started and see, has the signals, the life and the exit code of that one. Standard library
only.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
from types import FrameType
from typing import NoReturn

ADDRESS = "PAIRMILL_TEST_WARM"  # the path of warm_ranks.py's socket
NAMESPACES = ("pid", "net", "uts", "mnt")
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)


def stand_in(module: str, arguments: list[str]) -> NoReturn:
    """Have a warm process do it; hand signals on, end as it ends."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(os.environ[ADDRESS])

    def hand_on(number: int, frame: FrameType | None) -> None:
        server.send(str(number).encode())

    for number in SIGNALS:
        signal.signal(number, hand_on)
    request = {
        "module": module,
        "arguments": arguments,
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
    }
    files = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name in NAMESPACES]
    socket.send_fds(server, [json.dumps(request).encode()], [1, 2, *files])
    code = int(server.recv(16) or b"1")
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def main() -> None:
    """Stand in for the trainer, be anything else."""
    executable, dash_m, module, *arguments = sys.argv[1:]
    assert dash_m == "-m", sys.argv
    if module == "tools.cli":
        stand_in(module, arguments)
    sys.executable = executable  # with which slurm/launch.py starts its ranks
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
