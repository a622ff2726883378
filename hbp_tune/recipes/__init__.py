"""Recipes: a whole run in one readable file each, the unit that users copy."""
