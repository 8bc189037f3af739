"""Serving: an adapter's folder → an OpenAI-compatible server whose every request has its own user's gate."""
