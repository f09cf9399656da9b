"""Launchers of the project's programs: TPU VMs, Slurm clusters, single GPU hosts. They do not need JAX."""
