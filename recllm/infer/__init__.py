"""Scoring and generating with a trained adapter."""
