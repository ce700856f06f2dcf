"""Continuous batching: methods are generators over one image, the engine batches their model calls over all images."""
