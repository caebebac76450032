"""Runs side by side: a table of them, and a page."""
