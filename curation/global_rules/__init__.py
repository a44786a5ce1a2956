"""Global rules: rules that see the whole pool of what the rules before them have left.

One file each, registered by being in this folder (or in curation/dedup or curation/selectors). See
base.py for the contract and top_fraction.py for an example. Balancers are global rules too, with a
registry of their own (curation/balancing), since a balancer must be the last rule.
"""

from __future__ import annotations

import importlib
import pkgutil

from curation.global_rules.base import GlobalRule, Pool, ShardPart, Solution, global_rules

__all__ = ["GlobalRule", "Pool", "ShardPart", "Solution", "global_rules"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

importlib.import_module("curation.dedup")
importlib.import_module("curation.selectors")
