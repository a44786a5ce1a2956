"""Whether a launcher (torchrun, deepspeed, slurm/launch.py) made this process a rank of several.

All launchers say so by the same five variables. Where only some of them are there, or where srun
started several processes and no launcher any, guessing would hang waiting for peers, or do the work
once a process.
"""

from __future__ import annotations

import os

from configs.errors import UsageError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_launched() -> bool:
    """Return whether all of the launcher's variables are there; False where none is.

    Raises UsageError, with the variables, where only some are, or where this is one of several
    tasks of a Slurm step without any.
    """
    found = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    if found and missing:
        raise UsageError(
            f"the launcher's environment is half set: got {', '.join(found)}, "
            f"expected {', '.join(missing)} as well. "
            "Start with torchrun, or unset them for one process."
        )
    num_tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if not found and num_tasks != "1":
        raise UsageError(
            f"this is one of {num_tasks} tasks of a Slurm step, and none of "
            f"{', '.join(LAUNCHER_VARIABLES)} is set: each would do all of the work by itself. Use "
            "the scripts in slurm/, or a launcher in each task (docs/slurm.md)."
        )
    return bool(found)
