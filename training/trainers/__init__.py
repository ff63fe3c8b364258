"""Ways to learn. One module each, with `fit(spec, model, examples, run)`."""
