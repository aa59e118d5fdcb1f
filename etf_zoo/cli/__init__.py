"""The command line `etf-zoo`."""
