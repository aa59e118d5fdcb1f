"""Recipes: typed dataclasses read from YAML and the command line."""
