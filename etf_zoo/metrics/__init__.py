"""Metrics: how far features have collapsed (NC1 to NC4), and how bad a classifier's mistakes are."""

from .collapse import NeuralCollapse
from .distributed import sum_over_processes
from .severity import MistakeSeverity, preference_scores

__all__ = ["NeuralCollapse", "MistakeSeverity", "preference_scores", "sum_over_processes"]
