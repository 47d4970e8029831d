"""What there is in the world, and how it is drawn."""
