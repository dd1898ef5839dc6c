"""Benchmarks of a user's own configuration or model, on the user's own machine."""
