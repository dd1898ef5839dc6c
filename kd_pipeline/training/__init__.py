"""Training on Lightning: the module, its optimizer and schedule, checkpoints, and a whole run."""
