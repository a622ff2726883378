"""Lets `tune run hbp_full_finetune_distributed` (`python -m hbp_full_finetune_distributed`) find the packaged recipe."""

from hbp_tune.recipes.hbp_full_finetune_distributed import main

if __name__ == "__main__":
    main()
