"""Computed features on disk, by the digests of all that they depend on.

    CACHE/<key>/features.npy  float32 [n, D], not normalized     meta.json  what it is, in words
    CACHE/.parts-<key>/       batches of a run under way; a killed one goes on from them

A key is a sha256 over weights, architecture, preprocessing, tokenizer, precision and the digest of
the data: whatever changes, the key changes. Entries are folders published by rename, so that
concurrent runs may share a cache: who comes second finds the entry there. Arrays are mapped into
memory, not read whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import DataError
from configs.publish import publish_text, published_file, published_folder

FORMAT = 2  # of what stands in the cache, and of how features are computed
_FEATURES, _META = "features.npy", "meta.json"


def key_of(content: Mapping[str, Any]) -> str:
    """Return the key of features that depend on `content`."""
    text = json.dumps({"format": FORMAT, **content}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """Cached features [n, D] and what is known of them."""

    feature_nD: Tensor
    meta: dict[str, Any]


class FeatureCache:
    """A folder of features by key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, key: str) -> Entry | None:
        """Return an entry, or None where it is not there. Raises DataError where it is damaged."""
        place = self.folder / key
        if not self._is_there(key):
            return None
        try:
            meta = json.loads((place / _META).read_text(encoding="utf-8"))
            # Copy on write: torch wants memory that it might write to; the file never changes.
            array = np.load(place / _FEATURES, mmap_mode="c", allow_pickle=False)
            if list(array.shape) != meta["shape"]:
                raise ValueError(f"shape {list(array.shape)}, expected {meta['shape']}")
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"the cached features {place} are damaged ({error}). Remove the folder; they are "
                "computed again."
            ) from None
        return Entry(torch.from_numpy(array), meta)

    def put(self, key: str, feature_nD: Tensor, meta: Mapping[str, Any]) -> None:
        """Publish an entry, unless another process was first; its parts are removed."""
        if not self._is_there(key):
            array = feature_nD.numpy()
            try:
                with published_folder(self.folder / key) as temporary:
                    np.save(temporary / _FEATURES, array, allow_pickle=False)
                    publish_text(temporary / _META, _json({**meta, "shape": list(array.shape)}))
            except OSError:
                if not self._is_there(key):
                    raise
        self.remove_parts(key)

    def _is_there(self, key: str) -> bool:
        return (self.folder / key / _META).is_file()

    def remove_parts(self, key: str) -> None:
        """Remove the batches of an entry that is published."""
        shutil.rmtree(self._parts(key), ignore_errors=True)

    def _parts(self, key: str) -> Path:
        return self.folder / f".parts-{key}"

    def _part(self, key: str, number: int) -> Path:
        return self._parts(key) / f"{number:08d}.npz"

    def missing_parts(self, key: str, num_parts: int) -> list[int]:
        """Return the numbers of the parts that nobody has computed yet."""
        return [n for n in range(num_parts) if not self._part(key, n).is_file()]

    def put_part(
        self, key: str, number: int, feature_bD: Tensor, undecodable: Mapping[int, str]
    ) -> None:
        """Publish one batch of a run under way, unless another run has finished meanwhile."""
        reasons = json.dumps({str(k): v for k, v in undecodable.items()}, ensure_ascii=False)
        try:
            with published_file(self._part(key, number)) as file:
                np.savez(file, features=feature_bD.numpy(), undecodable=np.array(reasons))
        except FileNotFoundError:
            if not self._is_there(key):  # else: the other run removed the folder with the parts
                raise

    def join_parts(self, key: str, num_parts: int) -> tuple[Tensor, dict[int, str]]:
        """Return the features of all parts, in order, and the reasons of undecodable images."""
        features: list[Tensor] = []
        undecodable: dict[int, str] = {}
        for number in range(num_parts):
            with np.load(self._part(key, number), allow_pickle=False) as part:
                undecodable |= {int(k): v for k, v in json.loads(str(part["undecodable"])).items()}
                if part["features"].size:
                    features.append(torch.from_numpy(part["features"]))
        return torch.cat(features) if features else torch.empty(0, 0), undecodable

    def entries(self) -> list[tuple[str, dict[str, Any], int]]:
        """Return key, meta and bytes of every entry, by name of what it is."""
        found = []
        for path in sorted(self.folder.glob(f"*/{_META}")):
            meta = json.loads(path.read_text(encoding="utf-8"))
            size = sum(file.stat().st_size for file in path.parent.iterdir())
            found.append((path.parent.name, meta, size))
        return sorted(found, key=lambda entry: (str(entry[1].get("what")), entry[0]))


def _json(meta: Mapping[str, Any]) -> str:
    return json.dumps(meta, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def describe(folder: Path) -> str:
    """Return a table of what a cache holds."""
    entries: Sequence[tuple[str, dict[str, Any], int]] = FeatureCache(folder).entries()
    lines = [
        f"{key[:12]}  {size / 1e6:>9.1f} MB  {meta['shape'][0]:>9,} x {meta['shape'][1]:<5} "
        f"{meta.get('kind', '?'):<7} {meta.get('what', '?')} of {meta.get('checkpoint', '?')}"
        for key, meta, size in entries
    ]
    parts = len(list(folder.glob(".parts-*")))
    total = sum(size for _, _, size in entries)
    lines.append(f"{len(entries)} entries, {total / 1e6:,.1f} MB in {folder}")
    if parts:
        lines.append(f"{parts} unfinished (a run under way, or a killed one that will go on)")
    return "\n".join(lines)
