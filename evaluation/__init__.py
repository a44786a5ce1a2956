"""A checkpoint in, results out: features are computed once, and every method runs on them.

Start at suite.py (the run, top-down), then dataset.py, encoder.py, features.py, and one file a
method (zero_shot.py, retrieval.py). Imports `configs`, `pretrain.model` and `pretrain.checkpoint`
of ours only.
"""
