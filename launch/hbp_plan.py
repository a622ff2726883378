"""Lets `tune run hbp_plan` (`python -m hbp_plan`) find the packaged recipe."""

from hbp_tune.recipes.hbp_plan import main

if __name__ == "__main__":
    main()
