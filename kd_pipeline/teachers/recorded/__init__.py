"""Recorded teachers."""
