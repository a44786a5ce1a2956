"""The model: towers, similarity, tokenizer; no data, no training, nothing distributed.

Reading order: clip.py, features.py, similarity.py (the contract, without torch), geometries.py (its
mathematics), logits.py, heads.py, patches.py, tokenizer.py; torchvision_ops.py is why the import of
open_clip works beside CPU torch.
"""
