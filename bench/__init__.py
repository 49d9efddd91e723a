"""Races: what we claim, measured side by side in one run. `make bench` runs them; nothing here is a test."""
