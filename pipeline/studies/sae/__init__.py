"""Sparse autoencoders of what a network's blocks write: their training, their dictionaries, what they predict."""
