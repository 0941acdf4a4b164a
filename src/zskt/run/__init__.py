"""One lifecycle for everything that trains: log, checkpoints, resume, plots, report."""
