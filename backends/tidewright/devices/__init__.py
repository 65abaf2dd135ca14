"""What is particular to a kind of device: its kernels, and what is built on them."""
