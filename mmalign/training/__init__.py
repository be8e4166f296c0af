"""Training: from a configuration to a finished run. `train` decides what is run, `loop` runs it."""
