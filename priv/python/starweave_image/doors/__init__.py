"""Ways in: the port of an Elixir application and the command line. Only these know frames and arguments."""
