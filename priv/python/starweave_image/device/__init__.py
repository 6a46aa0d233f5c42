"""What computes: which device, what runs on it together, how long it takes and how much fits."""
