"""What a model of the open world got right, from its frames alone."""
