"""Planning: token lengths to groups, packs and optimizer steps, in integers; knows neither tensors nor files."""
