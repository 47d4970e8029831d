"""From a bundle to a model repository for NVIDIA's Triton server."""
