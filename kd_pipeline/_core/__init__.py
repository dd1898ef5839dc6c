"""Private utilities that every package uses."""
