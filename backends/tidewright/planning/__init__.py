"""`tidewright plan`: how much memory a model takes, how many GPUs a load needs. Pure arithmetic, without torch."""
