"""Lets `tune run hbp_profile_groups` (`python -m hbp_profile_groups`) find the packaged recipe."""

from hbp_tune.recipes.hbp_profile_groups import main

if __name__ == "__main__":
    main()
