"""Base classes of rewards: two towers, cross encoders, rewards of references or of other rewards."""
