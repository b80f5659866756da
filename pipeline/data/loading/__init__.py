"""From a packed dataset to batches: the order of samples, augmentation, loader processes, resume state."""
