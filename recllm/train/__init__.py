"""Collating, the trainer, fitting the sequence encoder."""
