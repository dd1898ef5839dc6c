"""Plots of runs and benchmarks, and image grids of batches."""
