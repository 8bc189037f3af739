"""Ranking metrics, statistics, baselines, the report."""
