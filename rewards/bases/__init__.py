"""Base classes of rewards: two towers, cross encoders, comparison with references, functions of other rewards."""
