"""Whole videos on a GPU, made with the commands that a user has."""
