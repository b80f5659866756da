"""Benchmarks and studies; each prints a table and, last, one JSON line."""
