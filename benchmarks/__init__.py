"""Benchmarks: what is measured, and against whom. See docs/benchmarks.md."""
