"""Video autoencoders: Wan's, made to stream, and the small one of blocks."""
