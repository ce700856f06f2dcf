"""The drawn world: how the bundled model was trained, and how it is judged by what was drawn."""
