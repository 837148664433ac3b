"""What goes on while the program does: batches read ahead and moved to the device, arrays brought to the host."""
