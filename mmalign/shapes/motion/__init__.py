"""Moving Shapes for video generators: clips of nine frames, their captions, an oracle, rewards and a base model."""
