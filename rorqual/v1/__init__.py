"""Stubs generated from proto/rorqual/v1 by `make stubs`; only `*wire.py` modules import them."""
