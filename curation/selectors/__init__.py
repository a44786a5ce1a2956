"""Rules over vectors of the samples (curation/vectors.py), which `pairmill score` makes.

`clusters` is a step of its own: it drops nobody for where it lies, and the rules behind it look
within its clusters. README.md says what each does; each is an ordinary global rule
(curation/global_rules/base.py), one file each, registered by being in this folder.
"""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
