"""Goldens of calibration and of label-free accuracy estimation."""

from __future__ import annotations

import re
from collections.abc import Iterator

from evaluation.methods import calibration as method
from evaluation.methods import mano as mano_method
from tools.conformance.evaluation.golden import EXACT, SCORE_RTOL, Golden
from tools.conformance.table import Row, compare


def ece(golden: Golden) -> Iterator[Row]:
    """ECE at every number of bins and temperature in the file."""
    logit_nC, label_n = golden.tensor("logits"), golden.tensor("labels").long()
    for key in sorted(golden.arrays):
        found = re.fullmatch(r"ece_(\d+)bins(?:_T([\d.]+))?", key)
        if not found:
            continue
        temperature = float(found[2] or 1)
        confidence_n, correct_n = method.confidences(logit_nC / temperature, label_n)
        bin_n = method.equal_width_bins(confidence_n, int(found[1]))
        ours = method.ece(confidence_n, correct_n, bin_n)
        yield compare(golden.name, key, ours, golden[key], atol=EXACT)


def mano(golden: Golden) -> Iterator[Row]:
    """Delta and score at every power, for every case in the file."""
    for case in sorted({key.split("__")[0] for key in golden.arrays}):
        numbered = sorted(
            int(key.rpartition("logits")[2])
            for key in golden.arrays
            if key.startswith(f"{case}__logits")
        )
        batches = [golden.tensor(f"{case}__logits{number}") for number in numbered]
        each = [mano_method.divergence(batch) for batch in batches]
        key = f"{case}__delta_each_batch"
        yield compare(golden.name, key, each, golden[key], atol=1e-6, rtol=SCORE_RTOL)
        published = mano_method.delta_of(batches, published=True)
        key = f"{case}__delta_original"
        yield compare(golden.name, key, published, golden[key], atol=1e-6, rtol=SCORE_RTOL)
        for key in sorted(golden.arrays):
            found = re.fullmatch(rf"{re.escape(case)}__p(\d+)__delta(orig|[\d.]+)", key)
            if found:
                delta = published if found[2] == "orig" else float(found[2])
                ours = mano_method.score(batches, delta, int(found[1]))
                yield compare(golden.name, key, ours, golden[key], atol=1e-6, rtol=SCORE_RTOL)
