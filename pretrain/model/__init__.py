"""The model: towers, similarity, tokenizer; no data, no training, nothing distributed.

Reading order: clip.py, similarity.py, patches.py, tokenizer.py; torchvision_ops.py is why the
import of open_clip works beside CPU torch.
"""

from pretrain.model.torchvision_ops import ensure_torchvision

ensure_torchvision()
