"""Ray's head or a worker on one node, in the foreground; ends on SIGUSR1 or SIGTERM.

    srun ... python -m slurm.ray_node head      # on the node that RAY_ADDRESS names
    srun ... python -m slurm.ray_node worker    # on the others

RAY_AUTH_MODE and RAY_AUTH_TOKEN come from the environment, the same on all nodes. Ray's files go to
a new folder below TMPDIR: /tmp/ray may be somebody else's.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import FrameType

from slurm.network import own_address_towards

# Nothing large passes through the object store (curation/engine.py).
_OBJECT_STORE_BYTES = 200 * 1024 * 1024
_PATIENCE_SECONDS = 120
_TRIES = 3  # Ray gives itself 30 seconds to start, which a busy node or a slow disk can take
_STARTING_SECONDS = 60


def await_port(address: str, port: int) -> None:
    """Wait until the head listens; SystemExit with the address where it does not."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            with socket.create_connection((address, port), timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                sys.exit(f"ray_node: {socket.gethostname()} cannot reach {address}:{port}: {error}")
            time.sleep(0.2)


def command(role: str, address: str, port: int, num_cpus: int, temp_folder: str) -> list[str]:
    """Return the command line of `ray start` for a role.

    Ray would look for a node's own address by way of the internet or the host name, and without
    either take the loopback, at which no other node finds it.
    """
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    words += ["--include-log-monitor=false"]  # nobody is shown what workers print
    if role == "head":
        # no autoscaler: the allocation is what it is
        words += ["--head", f"--port={port}", "--include-dashboard=false", "--no-monitor"]
        own: str | None = address
    else:
        words += [f"--address={address}:{port}"]
        own = own_address_towards(address)
    words += [f"--node-ip-address={own}"] if own else []
    return [
        *words,
        f"--num-cpus={num_cpus}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        f"--temp-dir={temp_folder}",
        "--disable-usage-stats",
    ]


def main() -> int:
    """Run Ray until it ends or is asked to."""
    (role,) = sys.argv[1:]
    address, _, port = os.environ["RAY_ADDRESS"].partition(":")
    num_cpus = int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    if role == "worker":
        await_port(address, int(port))
    temp_folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets' paths have 107 characters
    # `ray start` connects to what RAY_ADDRESS names; the head is yet to be there.
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    ray: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in ray:
            process.terminate()

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, hand_on)
    words = command(role, address, int(port), num_cpus, temp_folder)
    try:
        for _ in range(_TRIES):
            started = time.monotonic()
            # Its standard output is a page of advice on how to connect.
            ray.append(subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL))
            if asked:  # before it was there to be told
                ray[-1].terminate()
            code = ray[-1].wait()
            if asked or code == 0 or time.monotonic() - started > _STARTING_SECONDS:
                break
        return 0 if asked else code
    finally:
        shutil.rmtree(temp_folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
