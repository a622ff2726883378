"""Conversations to tokens and targets, by the checkpoint's own tokenizer and chat template."""
