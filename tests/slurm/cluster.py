"""A real Slurm of several nodes on this machine, from Debian's packages, without systemd.

    with Cluster(folder) as cluster:
        job = cluster.sbatch("--nodes=2", "job.sh")
        assert cluster.wait(job).state == "COMPLETED"

By hand (docs/slurm.md): `python -m tests.slurm.cluster FOLDER` boots one and opens a shell on its
login host; leaving the shell takes the cluster down. Needs root, for the namespaces.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
PACKAGES = "slurmctld slurmd slurm-client munge iproute2"
FINISHED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY",
}  # fmt: skip


def why_not() -> str | None:
    """Return why no cluster can be booted here, or None where it can."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "a virtual cluster needs root, for its namespaces"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--net", "--uts", "--fork", "true"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Job:
    """What `scontrol show job` says."""

    state: str
    exit_code: int
    restarts: int
    reason: str
    text: str


class Cluster:
    """A booted cluster. Leaving the context kills its first process, and with it all others."""

    def __init__(self, folder: Path, num_nodes: int = 2, cpus: int = 8) -> None:
        assert len(str(folder)) < 80, f"a munge socket's path has at most 107 characters: {folder}"
        self.folder, self.num_nodes = folder, num_nodes
        self._write_files(cpus)
        path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}

    def _write_files(self, cpus: int) -> None:
        for name in ("munge", "state", "spool", "log", "dev"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge/munge.key"
        key.touch(0o400)
        key.write_bytes(os.urandom(1024))
        for number in range(2):  # what stands for GPUs: a device file each is all Slurm asks for
            os.mknod(self.folder / f"dev/gpu{number}", 0o20666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/dev/gpu[0-1]\n")
        (self.folder / "plugstack.conf").touch(0o644)
        nodes = "\n".join(
            f"NodeName=n{i} NodeAddr=10.77.0.{i} CPUs={cpus} RealMemory=8000 Gres=gpu:2"
            for i in range(1, self.num_nodes + 1)
        )
        text = (HERE / "slurm.conf").read_text()
        text = text.replace("FOLDER", str(self.folder)).replace("NODES\n", f"{nodes}\n")
        (self.folder / "slurm.conf").write_text(text)

    def __enter__(self) -> Cluster:
        """Boot, and wait until all nodes are idle."""
        # PDEATHSIG: a killed test leaves no cluster behind. --kill-child hands that on.
        words = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--net", "--uts"]
        words += ["--fork", "--kill-child=KILL", "--mount-proc", str(HERE / "machine.sh")]
        self._machine = subprocess.Popen(
            [*words, str(self.folder), str(self.num_nodes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "log/machine.out").open("w"),
            text=True,
            env=self.environment,
        )
        try:
            assert self._machine.stdout is not None
            assert self._machine.stdout.readline() == "started\n", self.logs()
            self._inside = self._first_process()
            self.until(lambda: self.node_states() == ["idle"] * self.num_nodes, "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._machine.kill()
        self._machine.wait()

    def _first_process(self) -> str:
        children = Path(f"/proc/{self._machine.pid}/task/{self._machine.pid}/children")
        return children.read_text().split()[0]

    def logs(self) -> str:
        """Return the ends of all logs, for the message of a failure."""
        parts = []
        for path in sorted((self.folder / "log").iterdir()):
            parts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)

    def words(self, *command: str) -> list[str]:
        """Return the command line that runs `command` on the login host."""
        return ["nsenter", "-t", self._inside, "--mount", "--net", "--uts", "--pid", *command]

    def words_in(self, folder: Path, *command: str) -> list[str]:
        """Return the command line that runs `command` on the login host, in a folder."""
        return self.words("sh", "-c", 'cd "$0" && exec "$@"', str(folder), *command)

    def run(
        self, *command: str, timeout: float = 60, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login host; raise nothing for its exit code."""
        return subprocess.run(
            self.words_in(cwd or Path.cwd(), *command),
            env={**self.environment, **variables},
            capture_output=True, text=True, check=False, timeout=timeout,
        )  # fmt: skip

    def check(self, *command: str, **options: object) -> str:
        """Run a command on the login host; return what it printed, fail where it failed."""
        done = self.run(*command, **options)  # type: ignore[arg-type]
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def sbatch(self, *words: str, cwd: Path, variables: Mapping[str, str] | None = None) -> str:
        """Submit; return the job's number."""
        return self.check(
            "sbatch", "--parsable", *words, cwd=cwd, **(variables or {})
        ).strip()  # fmt: skip

    def job(self, number: str) -> Job:
        """Ask slurmctld for a job; of an array for the task that says most about the whole."""
        whole = self.check("scontrol", "show", "job", "--oneliner", number)
        tasks = [self._job(line) for line in whole.splitlines() if "JobState=" in line]
        unfinished = [task for task in tasks if task.state not in FINISHED]
        failed = [task for task in tasks if task.state != "COMPLETED"]
        return next(iter([*unfinished, *failed, *tasks]))

    @staticmethod
    def _job(text: str) -> Job:
        def field(name: str) -> str:
            found = re.search(rf"\b{name}=(\S*)", text)
            return found.group(1) if found else ""

        code, _, killed_by = field("ExitCode").partition(":")
        return Job(
            field("JobState"),
            int(code) or (128 + int(killed_by) if int(killed_by) else 0),
            int(field("Restarts")),
            field("Reason"),
            text,
        )

    def node_states(self) -> list[str]:
        """Return the state of each node, as sinfo shortens it."""
        done = self.run("timeout", "5", "sinfo", "-h", "-N", "-o", "%t")
        return done.stdout.split()

    def until(self, is_so: Callable[[], bool], what: str, timeout: float = 60) -> None:
        """Wait until something is so; fail with the logs where it does not become so."""
        deadline = time.monotonic() + timeout
        while not is_so():
            assert self._machine.poll() is None, f"the cluster has ended\n{self.logs()}"
            assert time.monotonic() < deadline, f"no {what} in {timeout} s\n{self.logs()}"
            time.sleep(0.1)

    def wait(self, number: str, timeout: float = 120) -> Job:
        """Wait for a job's end, cutting short what Slurm lets it wait after a requeue."""

        def is_finished() -> bool:
            self.release(number)
            return self.job(number).state in FINISHED

        self.until(is_finished, f"end of job {number}", timeout)
        return self.job(number)

    def release(self, number: str) -> bool:
        """Let a requeued job start now, not after Slurm's two minutes; whether it was waiting."""
        job = self.job(number)
        if job.state != "PENDING" or job.reason != "BeginTime":
            return False
        time.sleep(2)  # slurmd still removes what the start before left
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")
        return True

    def processes(self, number: str, **variables: str) -> list[int]:
        """Return the process ids (of this machine) of a job's Python with these variables."""
        wanted = {f"SLURM_JOB_ID={number}", *(f"{k}={v}" for k, v in variables.items())}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_text(errors="replace").split("\0")
                command = (folder / "cmdline").read_text(errors="replace").split("\0")
            except OSError:  # it has just ended
                continue
            if wanted <= set(environment) and "python" in command[0]:
                found.append(int(folder.name))
        return found

    def tell_machine(self, *words: str) -> None:
        """Start a node or cut it off; returns when that is done."""
        assert self._machine.stdin is not None
        assert self._machine.stdout is not None
        print(*words, file=self._machine.stdin, flush=True)
        assert self._machine.stdout.readline() == "obeyed\n", self.logs()


def main() -> int:
    """Boot a cluster, open a shell on its login host, take it down."""
    reason = why_not()
    if reason or len(sys.argv) != 2:
        print(reason or "usage: python -m tests.slurm.cluster FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1]).resolve()
    if folder.exists() and any(folder.iterdir()):
        print(f"{folder} is not empty; name a folder that is not there yet", file=sys.stderr)
        return 2
    with Cluster(folder) as cluster:
        shell = cluster.words_in(Path.cwd(), os.environ.get("SHELL", "/bin/bash"))
        return subprocess.run(shell, env=cluster.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
