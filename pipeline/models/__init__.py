"""Models: what the engine may ask of one, how checkpoints are loaded, and a closed-form model for tests."""
