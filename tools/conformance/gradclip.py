"""ZClip and AutoClip against the released codes' sequences (gradclip.npz): 1e-9.

The thresholds are those of pretrain/clipping.py, as the engine asks for them once a step. That they
arrive in the gradients is tested through the engine, at ZeRO 0 and 2 on two ranks, in
tests/pretrain/test_engine.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.clipping import Clipping, clippings
from tools.conformance.table import Row, compare, not_built

ATOL = 1e-9
_KEYS = {  # the released code's keyword: ours
    "alpha": "alpha", "z_thresh": "z_threshold", "warmup_steps": "warmup_steps",
    "clip_option": "spike", "mode": "mode", "clip_factor": "factor",
    "skip_update_on_spike": "skip_spikes", "max_grad_norm": "max_norm",
}  # fmt: skip


def zclip_of(keywords: dict[str, Any]) -> Clipping:
    """Return ZClip as the released code is configured by `keywords`; its own max_grad_norm is 1."""
    ours = {_KEYS[key]: None if v == "None" else v for key, v in keywords.items()}
    return clippings["zclip"](**{"max_norm": 1.0, **ours})


def sequences(clipping: Clipping, norms: list[float]) -> dict[str, list[float]]:
    """Return what a run with these norms sees: every quantity that the golden files have."""
    found: dict[str, list[float]] = {
        name: []
        for name in ("threshold", "clip_val", "post_clip_norm", "ema_mean_after", "ema_var_after")
    }
    for norm in norms:
        threshold = clipping.threshold(norm)
        state = clipping.state_dict()
        values = {
            "threshold": threshold,
            "clip_val": state.get("last_spike"),
            "post_clip_norm": norm
            if threshold is None
            else norm * min(1.0, threshold / (norm + 1e-6)),
            "ema_mean_after": state.get("mean"),
            "ema_var_after": state.get("variance"),
        }
        for name, value in values.items():
            found[name].append(np.nan if value is None else value)
    return found


def check_gradclip(path: Path) -> Iterator[Row]:
    """Yield a row a quantity of every configuration in the file."""
    with np.load(path) as arrays:
        golden = {key: arrays[key] for key in arrays.files}
    configured = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["zclip_cfgs"]
    norms = golden["seq/grad_norm"].tolist()
    for case in sorted({key.rpartition("/")[0] for key in golden} - {"seq"}):
        kind, _, name = case.partition("/")
        if kind == "zclip" and name in configured:
            ours = sequences(zclip_of(configured[name]), norms)
            ours["returned_total_norm"] = norms
        elif kind == "autoclip":
            ours = sequences(clippings["autoclip"](percentile=float(name[1:])), norms)
        else:
            yield not_built(path.stem, case)
            continue
        for key in sorted(key for key in golden if key.startswith(f"{case}/")):
            quantity = key.rpartition("/")[2]
            yield compare(f"{path.stem} {case}", quantity, ours[quantity], golden[key], atol=ATOL)
