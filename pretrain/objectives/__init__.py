"""What is minimised: one file, one pure function, one registration each.

Start at registry.py (the contract), then clip.py. An objective is registered by being in here.
"""

from __future__ import annotations

import importlib
import pkgutil

from pretrain.objectives.registry import Objective, objectives

__all__ = ["Objective", "objectives"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
