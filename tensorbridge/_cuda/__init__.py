"""What CUDA alone asks for: streams in order, lifetime across them, the ring of pinned slots, one memory pool."""
