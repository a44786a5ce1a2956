"""Data: order.py (which sample when), reader.py, decode.py, loader.py (whole batches in order)."""
