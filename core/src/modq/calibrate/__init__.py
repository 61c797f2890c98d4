"""Quantizes a model decoder block by decoder block, for algorithms that need to see the layers' inputs."""
