"""What is learned from, encoded once and kept: latents, embeddings, references, in shards on disk."""
