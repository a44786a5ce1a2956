"""From a configured path to a dataset: a folder, a YAML description, or remote storage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from configs.errors import DataError
from evaluation import remote
from evaluation.config import DatasetConfig, EvaluateConfig
from evaluation.dataset import EvaluationDataset
from evaluation.description import images_are_there, load_description
from evaluation.layout import load_folder


@dataclass(frozen=True)
class Absent:
    """A dataset of the suite that is not there."""

    config: DatasetConfig
    reason: str


def load_dataset(
    config: DatasetConfig, place: str | None = None, cache: Path = Path()
) -> EvaluationDataset:
    """List a dataset: splits, labels or captions, prompts.

    Raises DataError where it is not there or not what its form asks for.
    """
    place = place or config.path
    folder = remote.fetch_folder(place, cache) if remote.is_remote(place) else Path(place)
    if folder.suffix in (".yaml", ".yml") and folder.is_file():
        return load_description(folder, config.label, cache, config.task)
    if not folder.is_dir():
        raise DataError(
            f"there is no dataset folder {folder}; expected one in the CLIP_benchmark layout "
            "(classnames.txt, test/nshards.txt, test/0.tar), or a YAML description. Make it, or "
            "mend the path in the config."
        )
    remote.verify(folder, config.checksums)
    return load_folder(folder, config.label, config.task, config.groups)


def is_there(place: str) -> bool:
    """Whether a dataset stands at its place: its images, where it is a description."""
    if remote.is_remote(place):
        return remote.exists(f"{place.rstrip('/')}/test/nshards.txt")
    path = Path(place)
    if path.suffix in (".yaml", ".yml"):
        return path.is_file() and images_are_there(path)
    return path.is_file() or (path / "test" / "nshards.txt").is_file()


def load_datasets(
    config: EvaluateConfig,
) -> tuple[list[tuple[DatasetConfig, EvaluationDataset]], list[Absent]]:
    """Return the datasets that are there, and those that are absent (where that is reported)."""
    found, absent = [], []
    for section in config.datasets:
        place = config.place(section)
        if config.absent == "report" and not is_there(place):
            absent.append(Absent(section, f"no images at {place}"))
            continue
        found.append((section, load_dataset(section, place, config.cache)))
    return found, absent


def check_any(config: EvaluateConfig, num_found: int) -> None:
    """Raise DataError where none of a suite's datasets is there."""
    if not num_found:
        raise DataError(
            f"{config.name}: none of its {len(config.datasets)} datasets is there; the first is "
            f"expected at {config.place(config.datasets[0])}. Say by root=FOLDER where they are; "
            "`pairmill evaluate --list SUITE root=FOLDER` says which are there."
        )
