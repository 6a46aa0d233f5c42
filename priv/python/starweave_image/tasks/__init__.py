"""One module a task: how a request of that task is said to a stock pipeline."""
