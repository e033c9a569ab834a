"""Recipes: YAML files, and the schema that reads them."""
