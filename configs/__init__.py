"""The ground floor: the recipes (YAML, JSON) and what every part of pairmill needs.

Start at load.py (a run is a file), then draws.py (randomness is a function) and publish.py (done is
a file renamed into place). Imports the standard library, pydantic, PyYAML, numpy and rich only, and
nothing else of ours.
"""
