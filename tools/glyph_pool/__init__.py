"""The default data, needing no download: image-text pairs from the fonts that matplotlib ships.

Read fonts.py (what is drawn, and by which typefaces), captions.py (how it is said), split.py (what
is held out, and why), then pool.py, which puts them together and writes the files.
"""

from tools.glyph_pool.pool import make_pool

__all__ = ["make_pool"]
