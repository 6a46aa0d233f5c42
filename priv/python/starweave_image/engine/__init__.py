"""The engine: its start and end, and the run of one request."""
