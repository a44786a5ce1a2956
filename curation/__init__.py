"""Raw image-text shards in, a curated dataset and an account of every sample out.

What comes in: WebDataset tars. What goes out: WebDataset tars, their indexes, a manifest and a
report (docs/formats.md). Start at job.py, the stages in order; then shards.py and index.py, what a
shard is. Runs on Ray (engine.py alone imports it) and never imports torch.
"""
