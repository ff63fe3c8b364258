"""Headrace's gateway: who may run what, where, in which order and at what cost."""
