"""The life of the engine, and the run of one request."""
