"""Build a metadata list for MetaCLIP balancing from WordNet, texts and page views."""
