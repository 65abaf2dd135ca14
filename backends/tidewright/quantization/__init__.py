"""Weights in few bits: what they mean. How a device multiplies by them is the device's matter."""
