"""The content store for container images."""
