"""Metrics: how far features have collapsed (NC1 to NC4), what they are, and how bad a classifier's mistakes are."""

from .collapse import NeuralCollapse
from .distributed import sum_over_processes
from .fast_collapse import FastNeuralCollapse
from .severity import MistakeSeverity, preference_scores
from .shape import mean_energy_share, participation_ratio

__all__ = [
    "FastNeuralCollapse",
    "MistakeSeverity",
    "NeuralCollapse",
    "mean_energy_share",
    "participation_ratio",
    "preference_scores",
    "sum_over_processes",
]
