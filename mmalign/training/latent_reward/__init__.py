"""Training a latent reward on preference pairs, and how often it is right on pairs that it has not seen."""
