"""Models: the adapter that hooks `parallel` into torchtune's decoders."""
