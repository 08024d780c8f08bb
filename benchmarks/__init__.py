"""Benchmarks: measurements on real processes, each with a table of its own."""
