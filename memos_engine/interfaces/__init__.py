"""Ways in: the command line and the Hugging Face drop-in."""
