"""Reporting: what people see of the data, the plan and the run."""
