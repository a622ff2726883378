"""What a terminal shows: tables, advice, bad rows, a run as it goes."""
