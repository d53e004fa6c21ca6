"""How a run starts: accelerate's configuration for each shape of machine, and SLURM."""
