"""The sprites world: procedurally drawn concepts, the training of the shipped model, and its scoring."""
