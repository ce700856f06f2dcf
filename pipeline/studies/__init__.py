"""What is learnt from a model: the geometry of its local latent bases."""
