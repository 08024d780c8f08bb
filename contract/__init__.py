"""Checks of the contract, mostly by third-party tools: `make contract`."""
