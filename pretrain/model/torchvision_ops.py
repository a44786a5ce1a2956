"""Make `import torchvision` work beside a CPU build of torch.

PyPI's torchvision is built against CUDA torch: beside CPU torch its compiled operators cannot be
loaded, and its import then fails ("operator torchvision::nms does not exist") because it registers
shapes for operators that are not there. open_clip and timm import torchvision, so they fail too.
Nothing of ours uses the compiled operators: where they do not load, their schemas are declared
without an implementation, the import goes through, and calling one raises torch's own clear error.

Call `ensure_torchvision()` before the first import of torchvision, open_clip or timm in a process
(`pretrain.model.clip` and `evaluation.encoder` do so on import).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a Library undoes its definitions when collected


def ensure_torchvision() -> str:
    """Prepare the import of torchvision; return how: imported, absent, native or declared."""
    if "torchvision" in sys.modules:
        return "imported"
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return "absent"
    if _declared:
        return "declared"
    compiled = next(iter(sorted(Path(spec.origin).parent.glob("_C*.so"))), None)
    try:
        if compiled is None:
            raise OSError("torchvision has no compiled operators")
        torch.ops.load_library(str(compiled))  # type: ignore[no-untyped-call]
        return "native"
    except OSError:
        library = torch.library.Library(  # type: ignore[no-untyped-call]
            "torchvision", "FRAGMENT"
        )
        for schema in _SCHEMAS:
            library.define(schema)  # type: ignore[no-untyped-call]
        _declared.append(library)
        return "declared"
