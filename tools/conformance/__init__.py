"""Our code against the authors' own numbers: `python -m tools.conformance PART FOLDER`."""
