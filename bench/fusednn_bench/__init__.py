"""Support of the benchmarks: what is measured, how, and what is written.  The method is in ``bench/README.md``."""
