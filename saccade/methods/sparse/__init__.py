"""Sparse layers with weights of their own, trained from scratch."""
