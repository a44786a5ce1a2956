"""Drop images that are too small, too elongated, or have too few or too many bytes."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pyarrow as pa
from pydantic import Field

from curation.filters.base import Filter, Judgement, filters, first_reason


@filters.register("image_size")
def image_size(
    *,
    min_side: Annotated[int, Field(ge=0)] = 0,
    max_aspect: Annotated[float, Field(ge=1)] | None = None,
    min_bytes: Annotated[int, Field(ge=0)] = 0,
    max_bytes: Annotated[int, Field(ge=0)] | None = None,
) -> Filter:
    """Keep images with a shorter side of min_side pixels and a longer <= max_aspect times it.

    Sides are those of the stored image, before any resize; bytes are those of its file. DataComp's
    basic filter (arXiv:2304.14108, its released code) is min_side: 200, max_aspect: 3.0; LAION
    (arXiv:2210.08402) is min_bytes: 5000.
    """

    def judge(samples: pa.Table) -> Judgement:
        width, height = samples["width"].to_numpy(), samples["height"].to_numpy()
        shorter, longer = np.minimum(width, height), np.maximum(width, height)
        aspect = longer / shorter
        tests = [("side too short", shorter < min_side)]
        if max_aspect is not None:
            tests.append(("too elongated", aspect > max_aspect))
        num_bytes = samples["image_size"].to_numpy()
        tests.append(("too few bytes", num_bytes < min_bytes))
        if max_bytes is not None:
            tests.append(("too many bytes", num_bytes > max_bytes))
        values = {"min_side": pa.array(shorter, pa.int32()), "aspect": pa.array(aspect)}
        return Judgement(values, first_reason(len(shorter), tests))

    return judge
