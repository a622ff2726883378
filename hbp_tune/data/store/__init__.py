"""Data sets to a token store on disk that all processes share, and lengths where there is none."""
