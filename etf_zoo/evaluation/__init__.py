"""Measure a model on labeled images, and format the figures as a table."""

from .measure import Measurement, evaluate, format_table, measure

__all__ = ["Measurement", "evaluate", "measure", "format_table"]
