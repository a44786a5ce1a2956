"""Balancers: rules that give each sample a keep probability from counts over the whole pool.

One file each, registered by being in this folder. See base.py for the contract; metaclip.py, with
metadata.py and matching.py, for MetaCLIP.
"""

from __future__ import annotations

import importlib
import pkgutil

from curation.balancing.base import Balancer, balancers

__all__ = ["Balancer", "balancers"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
