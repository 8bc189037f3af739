"""Sequence encoders: one module each, behind the small interface of interface.py."""
