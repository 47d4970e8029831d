"""What a bundle is on disk: its manifest, signatures and engines."""
