"""What `benchmarks/store.py` is made of: the same views in every format, the ways to read them, and the clock."""
