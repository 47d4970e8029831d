"""What a bundle is on disk: its manifest, signatures and engines."""

DEFAULT = "stickers"
"""The shipped bundle that is meant where none is named."""
