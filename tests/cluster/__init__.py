"""Tests on machines of several, which real SLURM and network namespaces make of one."""
