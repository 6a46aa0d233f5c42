"""The entry points: the port of an Elixir application and the command line. Only they handle frames and arguments."""
