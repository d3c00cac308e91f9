"""The configuration tree: YAML files and the dataclasses that describe them."""
