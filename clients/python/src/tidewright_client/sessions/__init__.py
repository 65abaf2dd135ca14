"""Several generations over one WebSocket, which survive its breaking: core.py without I/O, and its two transports."""
