"""Kernels that a GPU has to judge before they may enter the package."""
