"""Checks and measurements on a GPU: `make gpu`."""
