"""Config: from a name on the command line to checked settings, before anything is built."""
