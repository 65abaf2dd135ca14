"""Paged KV cache: which blocks a sequence owns, and the tensors behind them."""
