"""Helpers beside the package: weights in parts."""
