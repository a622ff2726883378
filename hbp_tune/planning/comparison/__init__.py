"""How groups and methods are chosen and compared: metrics, simulation, baselines, search."""
