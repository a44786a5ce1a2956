"""A trainer as far as its data go: consumes batches with two workers until it is killed.

    python -m tests.pretrain.scripts.consume DATASET

Prints a line of process ids: its workers, the fork server, the resource tracker.
"""

import sys
import time
from multiprocessing import forkserver, resource_tracker

from curation.manifest import read_manifest
from pretrain.data.loader import batches
from tests.pretrain.test_loader import dataset_of


def children(parent: int) -> list[int]:
    with open(f"/proc/{parent}/task/{parent}/children") as file:
        return [int(pid) for pid in file.read().split()]


def main() -> None:
    dataset = dataset_of(read_manifest(sys.argv[1]))
    taken = batches(dataset, first=0, last=16 * 10**6, num_workers=2)
    next(taken), next(taken)
    server = forkserver._forkserver._forkserver_pid
    print(*children(server), server, resource_tracker._resource_tracker._pid, flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main()
