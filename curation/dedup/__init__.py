"""De-duplication: global rules that compare samples with each other (README.md)."""

from curation.dedup import caption_count, rule

__all__ = ["caption_count", "rule"]
