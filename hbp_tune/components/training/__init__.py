"""Training: loss weights, telemetry, and what is saved and resumed."""
