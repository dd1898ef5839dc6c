"""Tar shards, read in place."""
