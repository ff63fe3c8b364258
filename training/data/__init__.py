"""Rows: read, checked, cleaned and split. One module per kind of data, each with `load(spec) -> Rows`."""
