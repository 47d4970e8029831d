"""The model in PyTorch, the source of truth: configuration, transformer, concepts, encoders, weights."""
