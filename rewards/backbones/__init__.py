"""Models that rewards are built on, and the loading of their weights."""
