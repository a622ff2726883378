"""Data: the tokens of each sample, kept on disk, and the packs that a rank trains on; knows files and tensors, not meshes."""
