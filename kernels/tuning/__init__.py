"""Tuned kernel configurations, one JSON file for each backend and device."""
