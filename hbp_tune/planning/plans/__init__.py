"""What a plan is: its records, how they are divided over ranks, hashed and drawn."""
