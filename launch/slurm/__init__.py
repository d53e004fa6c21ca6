"""Runs on a SLURM cluster: the batch scripts, and one command that checks, submits and follows them."""
