"""The models that recipes name. One module per kind, each with `build(spec, rows)`."""
