"""Training on Lightning: the module, its optimizer and schedule, checkpoints, logging and the run folder."""
