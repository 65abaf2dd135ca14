"""The `tidewright` command."""
