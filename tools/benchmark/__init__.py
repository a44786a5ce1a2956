"""Speed and memory as ratios against a peer or a physical limit, both measured in one run."""
