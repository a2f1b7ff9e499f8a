"""The trainer: python -m dsv3_kernels.train. (Imports nothing, so that __main__ runs before torch.)"""
