"""What people see of running servers in a terminal: `tidewright top` and `tidewright trace`."""
