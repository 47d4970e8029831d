"""The backend that runs the engine's modules: the one part of the runtime that loads torch."""
