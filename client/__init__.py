"""A site's side: its private data, its local rounds, its personal state."""
