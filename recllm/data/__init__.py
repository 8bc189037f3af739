"""Behaviour in: readers, sequences, splits, candidates; nothing here needs torch."""
