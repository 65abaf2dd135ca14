"""Traces: W3C contexts, spans as light records, and their export by OTLP. For the gateway and the bridge alike."""
