"""Client of Tidewright's gateway."""
