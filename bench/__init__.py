"""Measurement: what the library costs, and how it stands beside its peers."""
