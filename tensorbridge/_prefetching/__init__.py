"""An iterable of batches read ahead and moved to the device while the one before it is used."""
