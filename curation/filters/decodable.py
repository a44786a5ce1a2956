"""Drop images that do not decode."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from curation.filters.base import Filter, Judgement, filters, first_reason, needing


@filters.register("decodable")
def decodable() -> Filter:
    """Keep images that decode to their last pixel.

    The scan reads and decodes every image for it, once, which costs some 100 times as much as
    reading headers. Without this rule a broken image is found by the trainer, which replaces it.
    """

    def judge(samples: pa.Table) -> Judgement:
        broken = pc.invert(samples["decodable"]).to_numpy(zero_copy_only=False).astype(bool)
        return Judgement({}, first_reason(len(broken), [("cannot be decoded", broken)]))

    return needing({"decodable"}, judge)
