"""Hierarchical Balance Packing for torchtune: fine-tune on mixed short and long data without wasting the hardware."""

__version__ = "0.1.0"
