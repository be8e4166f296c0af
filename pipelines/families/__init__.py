"""Model families, one a file: how each encodes, predicts and decodes."""
