"""The trainer: python -m dsv3_kernels.train."""
