"""Device functions without loads and stores, and the tables that say what kernels need to know of each."""
