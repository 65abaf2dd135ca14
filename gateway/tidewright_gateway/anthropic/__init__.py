"""Anthropic's Messages API as a translation to the one internal request. Not a pipeline of its own."""
