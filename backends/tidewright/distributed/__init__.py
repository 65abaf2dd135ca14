"""Tensor-parallel layers and sharded weight loading."""
