"""What the report says of methods beside each other: curves, detection, differences, details."""

import re
from html import unescape

import numpy as np

from evaluation.predictions import Prediction
from evaluation.result import Result
from evaluation.statistics import Metric
from tools.report.scorecard import scorecard_section
from tools.report.sources import Scorecard

HOSTILE = "<script>alert(1)</script>"


def row(method: str, metric: str, value: float, **keys: object) -> Result:
    tree = {"checkpoint": "a", "checkpoint_digest": "d", "samples_seen": 1, "dataset": "set"}
    tree |= {"method": method, "metric": metric, "value": value, "chance": 0.1, "n": 50, "seed": 0}
    tree |= {"interval": (value - 0.01, value + 0.01), "metric_definition": f"what {metric} is"}
    tree |= {"prompt_digest": None, "data_digest": "d", "config_digest": "c"}
    return Result.model_validate(tree | {"version": "0", "seconds": 1.0} | keys)


def shot(method: str, shots: int, value: float, **keys: object) -> Result:
    return row(method, "top1", value, shots=shots, seeds=(1, 2), **keys)


def page(results=(), details=(), predictions=()) -> str:
    return str(scorecard_section(Scorecard(list(results), [], list(details), list(predictions))))


def words(html: str) -> str:
    text = unescape(re.sub(r"<[^>]+>", " ", html))
    return re.sub(r"\s+", " ", text).replace("\u00a0", " ")


def test_few_shot_curves_say_which_method_ends_below_its_zero_shot_start():
    rows = [shot(m, k, v) for m, vs in {"gda": (0.5, 0.7), "tip": (0.5, 0.55)}.items()
            for k, v in zip((1, 16), vs, strict=True)]  # fmt: skip
    rows.append(shot("amu", 16, 0.6, compat="published"))
    html = page([*rows, row("zero_shot", "top1", 0.6)])
    said = words(html)
    assert "Mean over 2 seeds" in said
    assert (
        "not above its zero-shot start: amu (published protocol) on set, a (60.0 against 60.0 %); "
        "tip on set, a (55.0 against 60.0 %)." in said
    )
    assert "method 1 shot 16 shots zero-shot 60.0 60.0" in said
    assert "gda 50.0 (49.0 to 51.0) 70.0 (69.0 to 71.0)" in said
    assert re.findall(r'text-anchor="middle">([\d.]+)</text>', html)[:2] == ["1", "16"]
    above = words(page([shot("gda", 16, 0.7), row("zero_shot", "top1", 0.6)]))
    assert "every method is above its zero-shot start" in above


def test_detection_is_one_row_a_score_the_best_first():
    values = {"msp": (0.6, 0.5, 0.9), "knn_50": (0.9, 0.8, 0.2)}
    rows = [
        row("ood/far", f"{score}_{metric}", value)
        for score, own in values.items()
        for metric, value in zip(("auroc", "aupr", "fpr95"), own, strict=True)
    ]
    html = page(rows)
    said = words(html)
    assert "set (in distribution) against far, a: n = 50" in said
    assert "score AUROC AUPR FPR95 knn_50 90.0 % (89.0 % to 91.0 %) 80.0 %" in said
    assert said.index("knn_50") < said.index("msp")
    assert "what msp_fpr95 is" in html


def test_mano_stands_beside_the_accuracy_that_it_did_not_see():
    pairs = {"p": (0.1, 0.2), "q": (0.2, 0.4), "r": (0.3, 0.6)}
    rows = [row("mano", "mano_score", s, dataset=d) for d, (s, _) in pairs.items()]
    rows += [row("zero_shot", "top1", top, dataset=d) for d, (_, top) in pairs.items()]
    assert "a, over 3 datasets: R² 1.000, Spearman's rho 1.000" in words(page(rows))
    assert "too few to tell" in words(page([rows[0], rows[3]]))


def test_two_checkpoints_are_compared_on_the_same_images():
    base = np.tile([0.0, 1.0], 40)
    better = np.maximum(base, np.arange(80) % 5 == 0)
    predictions = [
        Prediction(name, "set", "zero_shot", None, "none", {"top1": Metric("top1", "", None, v)})
        for name, v in (("a", base), ("b", better))
    ]
    rows = [row("zero_shot", "top1", 0.5, checkpoint=name) for name in "ab"]
    said = words(page(rows, predictions=predictions))
    assert "b less a" in said
    assert "zero_shot top1 +10.00 points" in said


def test_details_show_classes_groups_and_curves_and_names_stay_text():
    matrix = {"classes": [HOSTILE, "cat"], "counts": [[1, 1], [0, 2]]}
    confusion = {"per_class": [[HOSTILE, 1, 2], ["cat", 2, 2]], "matrix": matrix}
    confusion["confused"] = [[HOSTILE, "cat", 1]]
    identity = {"checkpoint": "a", "dataset": "set", "method": "m", "shots": None}
    points = [[0.1, 0.2], [1.0, 0.5]]
    details = [
        identity | {"confusion": confusion},
        identity | {"roc": {"msp": [[0.0, 0.0], [1.0, 1.0]]}},
        identity | {"risk_coverage": {"softmax": points}},
        identity | {"reliability": [[0.3, 0.2, 5], [0.8, 0.9, 5]]},
        identity | {"groups": [["light", 0.5, 4], ["dark", 1.0, 2]]},
    ]
    html = page([row("zero_shot", "top1", 0.5)], details)
    said = words(html)
    assert "<script>" not in html
    for text in ("50 % of 2", "Confusion matrix", "ROC", "Risk over coverage", "100 % of 2"):
        assert text in said
