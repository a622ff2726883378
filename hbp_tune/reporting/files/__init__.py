"""Files that programs read: plans, profiles, run logs, traces."""
