"""Training of segmentation models: recipe, images with masks, what a step minimizes, the run."""
