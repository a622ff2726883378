"""What a plan is: its records, how they are shared out over ranks, hashed and drawn."""
