"""What kernels stand on: Triton, launches, memory layouts, tiles, channels, lines, sums, random numbers."""
