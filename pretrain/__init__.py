"""Manifest in, checkpoints out.

Start at train.py: build, loop, step, close. Data: data/ (order, reader, decode, loader).
Mathematics: model/, objectives/, reduction/. DeepSpeed: engine.py, the only file that imports it.
"""
