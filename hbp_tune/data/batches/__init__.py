"""Packs as CPU tensors, and the loader that gives each rank its own."""
