"""A training run: loop, checkpoints, export."""
