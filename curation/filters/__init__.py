"""Filters: one file each, every one of them registered here by being in this folder.

A filter is a factory: keywords in (they are its keys in the configuration), a function over index
rows out. See base.py for the contract and caption_length.py for the shortest example.
"""

from __future__ import annotations

import importlib
import pkgutil

from curation.filters.base import Filter, Judgement, filters

__all__ = ["Filter", "Judgement", "filters"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
