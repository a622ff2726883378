"""Parallel: tensors to a sharded forward and backward; knows meshes and modules, neither data sets nor torchtune."""
