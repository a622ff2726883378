"""What a plan costs: time and memory of a pack on a GPU, by model or fitted to measurements."""
