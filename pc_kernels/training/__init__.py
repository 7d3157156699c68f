"""For training loops: joint batches of several processes, memory banks, gradient caching, pooling."""
