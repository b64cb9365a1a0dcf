"""What saving writes with: from named tensors to a file, one module per format, and as a whole or not at all."""
