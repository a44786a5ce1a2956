"""Memory and time of the chunked objectives against the plain ones, in one run.

One rank's part of a global batch, forward and backward: b local rows against B, as on B / b ranks.
The peers are the loss as open_clip writes it, the whole [b, B] matrices under autograd.

Memory is counted, not measured: all tensors that are alive after each operation, at the full size
(b = 4096, B = 32768, D = 512) on the meta device, inputs and their gradients included. The peak of
a process says something else: what its allocator kept. Time is that of fewer rows and candidates.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy, logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pretrain.model.features import Features
from pretrain.model.geometries import Cosine
from pretrain.objectives import objectives
from tools.benchmark.ratio import alternate

Shape = tuple[int, int, int]
COUNTED: Shape = (4096, 32768, 512)
_PEERS = ("clip", "siglip")
_WANTED_PEAK, _WANTED_TIME = 0.25, 1 / 1.05


class AliveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that operations have made and that are still there."""

    def __init__(self, given: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._note(given)

    def _note(self, found: Any) -> None:
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._alive[storage._cdata] = (weak, storage.nbytes())
        self._alive = {
            key: (weak, num_bytes)
            for key, (weak, num_bytes) in self._alive.items()
            if not weak.expired()  # type: ignore[no-untyped-call]
        }

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        """Run an operation and count what there is after it."""
        found = function(*arguments, **(keywords or {}))
        self._note(found)
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._alive.values()))
        return found


class FirstOfMany:
    """Rank 0 of a world whose other ranks' rows are fixed; the exchange itself costs nothing."""

    def __init__(self, b: int, others: Tensor) -> None:
        self.rank = 0
        self._others = others
        self.size = 1 + len(others) // b

    def gather(self, local_bD: Tensor) -> Tensor:
        """Return the own rows and those of the others."""
        return torch.cat([local_bD, self._others[:, : local_bD.shape[1]]])


def make(shape: Shape, device: str) -> tuple[Features, FirstOfMany]:
    """Return local features and the group."""
    b, B, D = shape
    torch.manual_seed(0)
    image, text = (torch.randn(b, D, device=device).requires_grad_() for _ in range(2))
    others = torch.nn.functional.normalize(torch.randn(B - b, D, device=device), dim=-1)
    scale, bias = (torch.full((1,), value, device=device) for value in (14.3, -10.0))
    features = Features(image, text, scale.requires_grad_(), bias.requires_grad_())
    return features, FirstOfMany(b, others)


def plain(name: str, features: Features, group: FirstOfMany) -> Tensor:
    """Return the loss with its matrices whole."""
    image, text = (Cosine().embed(f) for f in (features.image_bD, features.text_bD))
    own = torch.arange(len(image), device=image.device)
    logits = features.logit_scale * image @ group.gather(text).T
    if name == "siglip":
        assert features.logit_bias is not None
        labels = -torch.ones_like(logits)
        labels[own, own] = 1
        return -logsigmoid(labels * (logits + features.logit_bias)).sum() / len(image)
    other = features.logit_scale * text @ group.gather(image).T
    return (cross_entropy(logits, own) + cross_entropy(other, own)) / 2


def runner(
    kind: str, name: str, features: Features, group: FirstOfMany, chunk: int
) -> Callable[[], None]:
    """Return a function that runs forward and backward once."""
    keywords = {"exchange": "gather"} if name == "siglip" else {}

    def run() -> None:
        for feature in (features.image_bD, features.text_bD, features.logit_scale):
            feature.grad = None
        if kind == "plain":
            loss = plain(name, features, group)
        else:
            objective = objectives[name](chunk_rows=chunk, **keywords)
            loss = objective.loss(features, similarity=Cosine(), group=group)  # type: ignore[arg-type]
        loss.backward()  # type: ignore[no-untyped-call]

    return run


def peak_mib(kind: str, name: str, shape: Shape, chunk: int) -> float:
    """Return the most that is alive during forward and backward, in MiB; nothing is computed."""
    features, group = make(shape, "meta")
    run = runner(kind, name, features, group, chunk)
    given = (features.image_bD, features.text_bD, group._others)
    with AliveBytes(given) as alive:
        run()
    return float(alive.peak / 2**20)


def _time_lines(shape: Shape, chunk: int, repeats: int) -> tuple[list[str], bool]:
    features, group = make(shape, "cpu")
    lines, short = [], False
    for name in _PEERS:
        both = [runner(kind, name, features, group, chunk) for kind in ("chunked", "plain")]
        ratio = alternate(f"{name}, chunked against plain", *both, repeats=repeats)
        short |= ratio.ratio < _WANTED_TIME
        lines.append(ratio.line(_WANTED_TIME))
    for name in sorted(set(objectives) - {"clip", "entailment"}):
        if objectives[name]().needs:
            continue
        both = [runner("chunked", one, features, group, chunk) for one in (name, "clip")]
        ratio = alternate(name, *both, repeats=repeats)
        lines.append(f"{name} takes {1 / ratio.ratio:.2f} times as long as clip (both chunked)")
    return lines, short


def main() -> int:
    """Print a line for each comparison; return 1 where one is short of what is wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(2048, 8192, 512), metavar="b B D")
    parser.add_argument("--chunk", type=int, default=512, help="chunk_rows of the timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="count memory only")
    options = parser.parse_args()
    short = False
    for name in _PEERS:
        ours = peak_mib("chunked", name, COUNTED, 512)
        theirs = peak_mib("plain", name, COUNTED, 512)
        short |= ours > _WANTED_PEAK * theirs
        print(f"{name}: peak {ours:,.0f} MiB, plain {theirs:,.0f} MiB: {ours / theirs:.3f} of it")
    if not options.memory:
        torch.set_num_threads(1)
        lines, slow = _time_lines(tuple(options.shape), options.chunk, options.repeats)
        print("\n".join(lines))
        short |= slow
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
