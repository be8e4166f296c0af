"""What every room stands on: errors, seeds, files, progress, registries; nothing here knows what is trained."""
