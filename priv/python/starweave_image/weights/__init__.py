"""Models: which there are, where their files are, whether these are sound, and which are in memory."""
