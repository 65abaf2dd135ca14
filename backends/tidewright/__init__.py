"""Tidewright: LLM serving on NVIDIA Triton Inference Server. Imports nothing: every part stays cheap to import."""

__version__ = "0.1.0"
