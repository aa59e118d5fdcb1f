"""Fine-tuning and probes."""
