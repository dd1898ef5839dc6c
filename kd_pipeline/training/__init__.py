"""Training on Lightning: the module, its optimiser and schedule, checkpoints, and a whole run."""
