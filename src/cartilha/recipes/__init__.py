"""Recipes: what a whole job does, one YAML file each; found by name (`cartilha run NAME`) or by path."""
