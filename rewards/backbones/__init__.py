"""Models that rewards stand on, and how their weights are loaded."""
