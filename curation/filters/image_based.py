"""Keep samples that look like those of a target set: DataComp's image-based selection.

S. Gadre et al., "DataComp" (arXiv:2304.14108, section 4): the pool is clustered by its image
vectors (k-means, 100,000 clusters of OpenAI's L/14), and a sample stays iff at least one image of
the target set (ImageNet's training images) is nearest to the same centroid.
"""

from __future__ import annotations

from typing import Annotated

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from configs.errors import UsageError
from curation.filters.base import Filter, Judgement, filters, first_reason


@filters.register("image_based")
def image_based(
    *, clusters: str = "clusters", min_targets: Annotated[int, Field(ge=1)] = 1
) -> Filter:
    """Keep samples in whose cluster at least `min_targets` vectors of the target set lie.

    A rule `clusters` with `target` comes before it; `clusters` is its name. A sample without a
    vector is dropped as "no vector"; the others of clusters with fewer as "no target near".
    """
    column = f"{clusters}.num_targets"

    def judge(samples: pa.Table) -> Judgement:
        if column not in samples.column_names:
            raise UsageError(
                f"image_based: no rule before it gives {column!r}. Put `- {{name: clusters, "
                "vectors: NAME, num_clusters: N, target: FILE.npy}` before it."
            )
        counts = samples[column].combine_chunks()
        lacks = pc.is_null(counts).to_numpy(zero_copy_only=False)
        few = pc.fill_null(pc.less(counts, min_targets), False).to_numpy(zero_copy_only=False)
        tests = [("no vector", lacks), ("no target near", few)]
        return Judgement({}, first_reason(len(lacks), tests))

    return judge
