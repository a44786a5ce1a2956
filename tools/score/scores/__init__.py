"""The scores: one file each, every one of them registered here by being in this folder.

A score is a factory: keywords in (they are its keys in the configuration), a Score out. See base.py
for the contract and clip_score.py for the shortest example. None imports torch at its top: a
configuration is read, and checked, where there is none.
"""

from __future__ import annotations

import importlib
import pkgutil

from tools.score.base import scores

__all__ = ["scores"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
