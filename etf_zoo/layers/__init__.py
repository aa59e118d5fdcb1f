"""Layers: the fixed-frame classifier and what it is made of."""
