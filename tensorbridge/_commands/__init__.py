"""What `python -m tensorbridge` and `info()` show."""
