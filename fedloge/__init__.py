"""The command: composes server, client and common."""
