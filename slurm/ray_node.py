"""Ray's head or a worker on one node, in the foreground: ends on SIGTERM and leaves nothing.

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

# Nothing large passes through the object store (curation/engine.py).
_OBJECT_STORE_BYTES = 200 * 1024 * 1024
_PATIENCE_SECONDS = 120


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
    """Return the command line of `ray start` for a role."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
    if role == "head":
        words += ["--head", f"--node-ip-address={address}", f"--port={port}"]
        words += ["--include-dashboard=false"]
    else:
        words += [f"--address={address}:{port}"]
    return [
        *words,
        f"--num-cpus={num_cpus}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        f"--temp-dir={temp_folder}",
        "--disable-usage-stats",
    ]


def main() -> int:
    """Run Ray until it ends or SIGTERM comes."""
    (role,) = sys.argv[1:]
    address, _, port = os.environ["RAY_ADDRESS"].partition(":")
    num_cpus = int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    if role == "worker":
        await_port(address, int(port))
    temp_folder = tempfile.mkdtemp(prefix="ray-")  # short: sockets' paths have 107 characters
    # `ray start` connects to what RAY_ADDRESS names; the head is yet to be there.
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    ray: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        for process in ray:
            process.terminate()

    signal.signal(signal.SIGTERM, hand_on)
    try:
        ray.append(
            subprocess.Popen(
                command(role, address, int(port), num_cpus, temp_folder),
                env=environment,
                stdout=subprocess.DEVNULL,  # a page of advice on how to connect
            )
        )
        return ray[0].wait()
    finally:
        shutil.rmtree(temp_folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
