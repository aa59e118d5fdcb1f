"""What the commands of `etf-zoo` do, one file a group; their options are in `etf_zoo_cli.py`, beside the package."""
