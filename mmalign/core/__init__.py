"""The basis of all other packages: errors, seeds, files, progress, registries; independent of models and methods."""
