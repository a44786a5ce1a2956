"""The training state on disk: safetensors files, one a rank, that any number of ranks can read.

A tensor is called KIND/NAME: `weight` (fp32 master weights), the optimizer's own names (`exp_avg`,
`exp_avg_sq`), `ema`, `mean` (model/attentive.py) and `random`. Each file says where in the
flattened parameter its elements start, so that a reader takes the elements it needs out of
whichever files have them. No pickle.

Legend: n elements of a flattened parameter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import CheckpointError

_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.uint8: "U8", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL",
}  # fmt: skip
_PATTERN = "state-*.safetensors"


def state_file(folder: Path, rank: int) -> Path:
    """Return where one rank's state lies."""
    return folder / _PATTERN.replace("*", f"{rank:05d}")


class Layout(NamedTuple):
    """What a file says of its tensors: by KIND/NAME its first element; by NAME its full shape and
    the optimizer's scalars.
    """

    starts: dict[str, int]
    shapes: dict[str, list[int]]
    scalars: dict[str, dict[str, float]]


def write_state(path: Path, tensors: Mapping[str, Tensor], layout: Layout) -> str:
    """Write host tensors in the safetensors format, flushed to disk; return `xxh3-128:<hex>`.

    The digest is taken while writing, so that the file need not be read again.
    """
    header: dict[str, Any] = {"__metadata__": {"layout": json.dumps(layout)}}
    position = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    with open(path, "wb") as file:
        for chunk in (len(text).to_bytes(8, "little"), text):
            digest.update(chunk)
            file.write(chunk)
        for tensor in tensors.values():
            data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return f"xxh3-128:{digest.hexdigest()}"


class _Piece(NamedTuple):
    start: int
    size: int
    file: int


class StateReader:
    """All the state files of a checkpoint, whatever number of ranks wrote them."""

    def __init__(self, folder: Path) -> None:
        """Read the headers. Raises CheckpointError where there are none or they cannot be read."""
        self._folder = folder
        self._paths = sorted(folder.glob(_PATTERN))
        if not self._paths:
            raise CheckpointError(f"{folder} has no {_PATTERN}: it holds no training state.")
        self._files: list[Any] = []
        self._pieces: dict[str, list[_Piece]] = {}
        self._kinds: dict[str, set[str]] = {}
        self.shapes: dict[str, list[int]] = {}
        self.scalars: dict[str, dict[str, float]] = {}
        for number, path in enumerate(self._paths):
            try:
                file: Any = safe_open(path, framework="pt")
                layout = Layout(*json.loads(file.metadata()["layout"]))
                sizes = {key: file.get_slice(key).get_shape()[0] for key in layout.starts}
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}.") from None
            self._files.append(file)
            self.shapes |= layout.shapes
            self.scalars |= layout.scalars
            for key, start in layout.starts.items():
                piece = _Piece(start, sizes[key], number)
                self._pieces.setdefault(key, []).append(piece)
                kind, _, name = key.partition("/")
                self._kinds.setdefault(name, set()).add(kind)

    def names(self, kind: str) -> set[str]:
        """Return the names that there are tensors of one kind of."""
        return {name for name, kinds in self._kinds.items() if kind in kinds}

    def kinds(self, name: str) -> set[str]:
        """Return the kinds of tensor that there are of one name."""
        return self._kinds.get(name, set())

    def read(self, kind: str, name: str, start: int, size: int) -> Tensor:
        """Return elements [start, start + size) of a flattened tensor.

        Raises CheckpointError where the files have not got them all.
        """
        parts, position = [], start
        for piece in sorted(self._pieces.get(f"{kind}/{name}", [])):
            first = max(position, piece.start)
            last = min(start + size, piece.start + piece.size)
            if first != position or first >= last:
                continue
            values = self._files[piece.file].get_slice(f"{kind}/{name}")
            parts.append(values[first - piece.start : last - piece.start])
            position = last
        if position != start + size or not parts:
            raise CheckpointError(
                f"{self._folder} has not got all of {kind} {name}: elements from {position:,} to "
                f"{start + size:,} are missing. It is damaged, or of another model."
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole(self, kind: str, name: str) -> Tensor:
        """Return a tensor in its full shape."""
        shape = self.shapes[name]
        size = 1
        for side in shape:
            size *= side
        return self.read(kind, name, 0, size).view(shape)

    def random(self, rank: int) -> dict[str, Tensor]:
        """Return the random states of a rank by device; empty where no such rank wrote."""
        for path, file in zip(self._paths, self._files, strict=True):
            if path == state_file(self._folder, rank):
                keys = [key for key in file.keys() if key.startswith("random/")]  # noqa: SIM118
                return {key.partition("/")[2]: file.get_tensor(key) for key in keys}
        return {}
