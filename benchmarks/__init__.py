"""Benchmarks: each measures this project, its peers and the limit of the machine in the same run."""
