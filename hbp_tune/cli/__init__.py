"""The `hbp` command: torchtune's own, with our recipes, configurations and more."""
