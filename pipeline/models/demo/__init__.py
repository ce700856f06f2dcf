"""The bundled demo model: the world it was trained on, the oracle that judges its edits, and its weights."""
