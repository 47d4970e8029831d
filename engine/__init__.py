"""The model in PyTorch, the source of truth: configuration, transformer, concept modules, encoders, weights."""
