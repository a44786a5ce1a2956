"""`pairmill doctor`: what this machine has of what pairmill needs, and how to get the rest."""

from tools.doctor.findings import Finding, Level
from tools.doctor.visit import examine

__all__ = ["Finding", "Level", "examine"]
