"""Kernels written for the processor at hand; whatever has none runs in torch."""
