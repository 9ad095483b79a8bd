"""Held-out scoring, with intervals."""
