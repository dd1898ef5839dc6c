"""Plumbing that every package uses; nothing here is public."""
