"""Generations over a WebSocket, /v1/stream: typed messages, credits, and resuming after a dropped connection."""
