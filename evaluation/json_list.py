"""A JSON list of objects beside the results, into which every run merges its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.publish import publish_text

Json = dict[str, Any]


@dataclass(frozen=True)
class JsonList:
    """A kind of file: its name, what it holds, and the key that identifies and sorts objects."""

    name: str
    what: str
    key: Callable[[Json], Any]

    def read(self, folder: Path) -> list[Json]:
        """Return the objects that stand in a folder; none where nothing was published yet.

        Raises:
            DataError: the file is not such a list.
        """
        path = folder / self.name
        if not path.exists():
            return []
        try:
            objects: list[Json] = json.loads(path.read_text(encoding="utf-8"))
            sorted(objects, key=self.key)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path} is not a list of {self.what} ({error!r}). Move the file away, or choose "
                "another `output`."
            ) from None
        return objects

    def publish(self, folder: Path, new: Sequence[Json], *, indent: int | None = None) -> Path:
        """Merge objects into the folder's file, within `result.locked`; those of a key replace."""
        path = folder / self.name
        replaced = {self.key(item) for item in new}
        kept = [item for item in self.read(folder) if self.key(item) not in replaced]
        merged = sorted([*kept, *new], key=self.key)
        publish_text(path, json.dumps(merged, ensure_ascii=False, indent=indent) + "\n")
        return path
