"""The launcher of one node: starts a process for each GPU, hands signals on, ends as they end.

    srun --ntasks-per-node=1 python -m slurm.launch --processes=8 -- -m tools.cli pretrain CONFIG

Ranks are static: node k (SLURM_NODEID) has ranks k*p to k*p+p-1, so that rank 0 is on the first
node. MASTER_ADDR and MASTER_PORT come from the environment. Why not torchrun: it turns every exit
code of a rank into 1 (75 means: saved on request, worth requeueing), does not hand SIGUSR1 on, and
kills a rank that is still saving after 30 seconds.

Exit code: 0 where all ranks ended with 0; else that of the first rank that did not (128 + N where
signal N ended it). It is also the first word of --exit-file, which the first node to write it owns:
srun itself reports the highest code of all nodes, also of those that it killed for the failure of
another. A node whose ranks all saved and ended with 75 exits with 0 (the file says 75), so that
`srun --kill-on-bad-exit` lets the other nodes finish what they save.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from slurm.network import choose_gloo_interface

STOPPED = 75  # exit code of a rank that saved on request
HANDED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT)
_GRACE_SECONDS = 10.0  # for the other ranks' own last words after one has failed
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def rank_environment(
    environment: Mapping[str, str], *, local_rank: int, processes: int
) -> dict[str, str]:
    """Return what a rank's process gets beside the node's environment."""
    node = int(environment.get("SLURM_NODEID", "0"))
    num_nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    own = {
        "RANK": node * processes + local_rank,
        "LOCAL_RANK": local_rank,
        "WORLD_SIZE": num_nodes * processes,
        "LOCAL_WORLD_SIZE": processes,
    }
    return {name: str(value) for name, value in own.items()}


class Node:
    """The processes of this node."""

    def __init__(self, words: Sequence[str], processes: int) -> None:
        self._handed_on: set[int] = set()
        self._ranks: list[subprocess.Popen[bytes]] = []
        # Blocked until all are started: a signal in between would miss some of them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDED_ON)
        for number in HANDED_ON:
            signal.signal(number, self._hand_on)
        for local_rank in range(processes):
            own = rank_environment(os.environ, local_rank=local_rank, processes=processes)
            self._ranks.append(
                subprocess.Popen(
                    [sys.executable, *words],
                    env={**os.environ, **own},
                    preexec_fn=lambda: self._prepare(before),
                )
            )
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    @staticmethod
    def _prepare(mask: set[signal.Signals] | set[int]) -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed launcher leaves no rank behind
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._handed_on.add(number)
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    def wait(self) -> tuple[int, str]:
        """Wait for all ranks; return the code of the first that failed, and what happened.

        After a failure the others have ten seconds to end by themselves.
        """
        code, what, deadline = 0, "", float("inf")
        running = dict(enumerate(self._ranks))
        while running:
            for local_rank, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[local_rank]
                ended, how = self._meaning(process.returncode)
                if ended and not code:
                    code, what = ended, f"local rank {local_rank} {how}"
                if ended and process.returncode != STOPPED:
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if time.monotonic() > deadline:
                for process in running.values():
                    process.kill()
            time.sleep(0.05)
        return code, what

    def _meaning(self, returncode: int) -> tuple[int, str]:
        if returncode >= 0:
            return returncode, f"ended with exit code {returncode}"
        name = signal.Signals(-returncode).name
        if -returncode in self._handed_on:  # it came before the rank could listen
            return STOPPED, f"was ended by {name} before it had anything to save"
        return 128 - returncode, f"was ended by {name}"

    def all_saved(self) -> bool:
        """Whether every rank ended by itself, saving on request."""
        return all(rank.returncode == STOPPED for rank in self._ranks)


def claim(exit_file: Path, code: int, what: str) -> None:
    """Write the job's exit code and its reason, unless another node was first."""
    try:
        with open(exit_file, "x", encoding="utf-8") as file:
            file.write(f"{code} {socket.gethostname()}: {what}\n")
    except FileExistsError:
        return


def main(arguments: Sequence[str] | None = None) -> int:
    """Start this node's ranks and wait for them; return the node's exit code."""
    parser = argparse.ArgumentParser(prog="python -m slurm.launch", description=__doc__)
    parser.add_argument("--processes", type=int, default=1, help="on each node; one a GPU")
    parser.add_argument("--exit-file", type=Path, help="on storage that all nodes share")
    parser.add_argument("words", nargs="+", help="what Python runs: -m MODULE ARGUMENTS")
    options = parser.parse_args(arguments)
    if "MASTER_ADDR" in os.environ and os.environ.get("SLURM_STEP_NUM_NODES", "1") != "1":
        choose_gloo_interface(os.environ["MASTER_ADDR"])
    node = Node(options.words, options.processes)
    code, what = node.wait()
    if code:
        print(f"launch: {socket.gethostname()}: {what}", file=sys.stderr, flush=True)
        if options.exit_file is not None:
            claim(options.exit_file, code, what)
            return 0 if node.all_saved() else code
    return code


if __name__ == "__main__":
    sys.exit(main())
