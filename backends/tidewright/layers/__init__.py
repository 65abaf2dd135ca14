"""What models are made of: layers that cut and load their own weights."""
