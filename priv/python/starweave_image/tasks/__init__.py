"""One module per task: how a request for that task becomes the call of a stock pipeline."""
