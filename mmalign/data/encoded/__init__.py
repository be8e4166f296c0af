"""Training data, encoded once and kept: latents, embeddings, references, in shards on disk."""
