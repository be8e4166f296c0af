"""Training a latent reward on preference pairs, and measuring its accuracy on held-out pairs."""
