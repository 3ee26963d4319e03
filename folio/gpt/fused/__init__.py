"""Fused GPU kernels for training in half precision."""
