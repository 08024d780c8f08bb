"""The contract, proven by tools that nobody here wrote: `make contract`."""
