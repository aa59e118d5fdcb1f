"""The twins: how a frame is put on a model, and timm's registry of them."""
