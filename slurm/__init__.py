"""Slurm: sbatch scripts that can be read and submitted as they are, and the thin submitter.

`pretrain.sbatch`, `curate.sbatch` and `evaluate.sbatch` are complete; the modules are what they run
on each node (preflight, launch, ray_node) and what `pairmill submit` does before it calls sbatch.
"""
