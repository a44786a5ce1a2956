"""How a site runs Python in a container: what that adds to srun's options and before Python.

Neither is needed; both are passed to the scripts as PAIRMILL_SRUN and PAIRMILL_PREFIX.
"""

from __future__ import annotations

from typing import NamedTuple

from configs.errors import ConfigError
from configs.registry import Registry


class Container(NamedTuple):
    """Words for srun, and words before Python."""

    srun: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()


containers = Registry[Container]("container")


def _words(*words: str) -> tuple[str, ...]:
    spaced = [word for word in words if len(word.split()) != 1]
    if spaced:
        raise ConfigError(
            f"container: {spaced[0]!r} has a space in it, where the scripts split words; use a "
            "path without one."
        )
    return words


@containers.register("pyxis")
def pyxis(*, image: str, mounts: tuple[str, ...] = ()) -> Container:
    """Return options of NVIDIA's pyxis plugin: https://github.com/NVIDIA/pyxis. mounts: SRC:DST."""
    options = [f"--container-image={image}"]
    if mounts:
        options.append(f"--container-mounts={','.join(mounts)}")
    return Container(srun=_words(*options, "--no-container-mount-home"))


@containers.register("apptainer")
def apptainer(*, image: str, binds: tuple[str, ...] = (), nv: bool = True) -> Container:
    """Return `apptainer exec`: https://apptainer.org/docs. binds: SRC[:DST]; nv: NVIDIA's GPUs."""
    options = [*(["--nv"] if nv else []), *(f"--bind={bind}" for bind in binds)]
    return Container(prefix=_words("apptainer", "exec", *options, image))
