"""Sequences of users become instruction examples."""
