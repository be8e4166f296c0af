"""The systems of a comparison: models, adapters and trainings, each with its facts."""
