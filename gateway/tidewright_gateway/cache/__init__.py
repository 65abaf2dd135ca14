"""Answers that would be the same again: one run for all who ask at the same time, and kept for those who ask later."""
