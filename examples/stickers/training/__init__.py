"""How a model learns the open world."""
