"""Train a latent reward model on preference pairs: `mmalign train-reward`; the result is the reward `latent`."""
