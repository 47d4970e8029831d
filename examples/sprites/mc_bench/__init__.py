"""MC-Bench in the sprites world: a small scorer of its own in CLIP's and DINO's place, and the one table."""
