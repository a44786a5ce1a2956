"""`pairmill score`: models judge the samples of shards, and columns and vectors keep what they say.

curation/scoring.py runs it over shards and actors; here is what it is handed: the scores (scores/,
one file each), the model that they share, decoding ahead of it (scorer.py), OCR (ocr.py).
"""
