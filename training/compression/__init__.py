"""Ways to make a model small. One module each."""
