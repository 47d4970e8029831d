"""What there is in the open world: picture sets, nouns, scenes, captions, and how they are drawn."""
