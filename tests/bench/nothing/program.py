"""A program that does nothing: what is left is the start."""
