"""The gateway: one OpenAI-compatible endpoint in front of one or many Tritons. Knows their schema, never the engine."""
