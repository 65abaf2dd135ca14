"""Which trace a request is part of, and its spans: recorded while it runs, made and exported only if it is kept."""
