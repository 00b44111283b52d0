"""What both sides agree on and nothing else: the learning core, its configuration and its file formats."""
