"""Registers, spills and shared memory of the shipped kernels, found without a GPU."""
