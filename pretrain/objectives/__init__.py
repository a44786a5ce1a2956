"""What is minimised: one file, one pure function, one registration each.

Start at registry.py, clip.py.
"""

from pretrain.objectives import clip as clip
from pretrain.objectives.registry import objectives as objectives
