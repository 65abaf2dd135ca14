"""The data of one step on its way from the plan to the device: persistent buffers, filled incrementally."""
