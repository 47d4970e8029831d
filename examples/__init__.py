"""Worked examples: each folder is one small world, complete from data to scores."""
