"""Memory and time of the chunked objectives against the plain ones, in one run.

One rank's part of a global batch, forward and backward: b local rows against B, as on B / b ranks.
The default is b = 4096, B = 32768, D = 512 with 512 rows a chunk, all divided by 4. The peers are
the loss as open_clip writes it, the whole [b, B] matrices under autograd. The peak is that of a
fresh process, above what it held before the loss.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from pretrain.model.features import Features
from pretrain.model.geometries import Cosine
from pretrain.objectives import objectives
from tools.benchmark.ratio import alternate

_PEERS = {"clip": "clip", "siglip": "siglip"}
_WANTED_PEAK, _WANTED_TIME = 0.25, 1 / 1.05


class FirstOfMany:
    """Rank 0 of a world whose other ranks' rows are fixed; the exchange itself costs nothing."""

    def __init__(self, b: int, others: dict[int, Tensor]) -> None:
        self.rank = 0
        self._others = others
        self.size = 1 + len(next(iter(others.values()))) // b

    def gather(self, local_bD: Tensor) -> Tensor:
        """Return the own rows and those of the others."""
        return torch.cat([local_bD, self._others[0][:, : local_bD.shape[1]]])


def make(b: int, B: int, D: int) -> tuple[Features, FirstOfMany]:
    """Return local features and the group."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(b, D, generator=generator).requires_grad_() for _ in range(2))
    others = torch.nn.functional.normalize(torch.randn(B - b, D, generator=generator), dim=-1)
    scale = torch.tensor([14.3]).requires_grad_()
    features = Features(image, text, scale, torch.tensor([-10.0]).requires_grad_())
    return features, FirstOfMany(b, {0: others})


def plain(name: str, features: Features, group: FirstOfMany) -> Tensor:
    """Return the loss with its matrices whole."""
    image, text = (Cosine().embed(f) for f in (features.image_bD, features.text_bD))
    own = torch.arange(len(image))
    logits = features.logit_scale * image @ group.gather(text).T
    if name == "siglip":
        assert features.logit_bias is not None
        labels = -torch.ones_like(logits)
        labels[own, own] = 1
        return -logsigmoid(labels * (logits + features.logit_bias)).sum() / len(image)
    other = features.logit_scale * text @ group.gather(image).T
    return (cross_entropy(logits, own) + cross_entropy(other, own)) / 2


def runner(kind: str, name: str, shape: tuple[int, int, int], chunk: int) -> Callable[[], None]:
    """Return a function that runs forward and backward once."""
    features, group = make(*shape)
    keywords = {"exchange": "gather"} if name == "siglip" else {}

    def run() -> None:
        if kind == "plain":
            loss = plain(name, features, group)
        else:
            objective = objectives[name](chunk_rows=chunk, **keywords)
            loss = objective.loss(features, similarity=Cosine(), group=group)  # type: ignore[arg-type]
        loss.backward()  # type: ignore[no-untyped-call]

    return run


def peak_mib(kind: str, name: str, shape: tuple[int, int, int], chunk: int) -> float:
    """Return the peak of forward and backward in a fresh process, in MiB."""
    words = [kind, name, *map(str, shape), str(chunk)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __spec__.name, "--child", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def _child(kind: str, name: str, b: str, B: str, D: str, chunk: str) -> None:
    runner(kind, name, (8, 64, 16), 8)()  # libraries loaded, threads started
    run = runner(kind, name, (int(b), int(B), int(D)), int(chunk))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> int:
    """Print a line for each comparison; return 1 where one is short of what is wanted."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=3, default=(1024, 8192, 128), metavar="b B D")
    parser.add_argument("--chunk", type=int, default=128, help="chunk_rows; b / 8 by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(*options.child)
        return 0
    torch.set_num_threads(1)
    shape: tuple[int, int, int] = tuple(options.shape)
    short = False
    for name in _PEERS:
        ours = peak_mib("chunked", name, shape, options.chunk)
        theirs = peak_mib("plain", name, shape, options.chunk)
        short |= ours > _WANTED_PEAK * theirs
        print(f"{name}: peak {ours:.0f} MiB, plain {theirs:.0f} MiB: {ours / theirs:.3f} of it")
        functions = [runner(kind, name, shape, options.chunk) for kind in ("chunked", "plain")]
        ratio = alternate(f"{name}, chunked against plain", *functions, repeats=options.repeats)
        short |= ratio.ratio < _WANTED_TIME
        print(ratio.line(_WANTED_TIME))
    functions = [runner("chunked", name, shape, options.chunk) for name in ("cloob", "clip")]
    ratio = alternate("cloob", *functions, repeats=options.repeats)
    print(f"cloob takes {1 / ratio.ratio:.2f} times as long as clip (both chunked)")
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
