"""The NVIDIA GPU: kernels in the Triton language (the compiler, not the server)."""
