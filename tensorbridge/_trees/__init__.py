"""Nested containers of arrays: walked, decided leaf by leaf, packed for the bus, and built again as they were."""
