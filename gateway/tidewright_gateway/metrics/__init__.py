"""The gateway's Prometheus metrics: their catalogue, and how they are recorded."""

from tidewright_gateway.metrics.recorder import Metrics

__all__ = ["Metrics"]
