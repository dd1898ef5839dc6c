"""Benchmarks of this repository against other libraries and over sizes, run from a checkout as modules."""
