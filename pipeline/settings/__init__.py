"""What a recipe may say, beside pipeline/recipe.py: its sections, its errors in plain words, its reference."""
