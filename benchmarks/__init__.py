"""Measurements: experiment files, records of what they gave, and the tables made from records."""
