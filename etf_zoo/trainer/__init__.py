"""Pretraining and fine-tuning; installed with the extra `training`. Nothing else in etf_zoo imports it."""
