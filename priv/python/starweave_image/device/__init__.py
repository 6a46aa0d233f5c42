"""Computation: the choice of the device, batching, the durations of passes and the limits of memory."""
