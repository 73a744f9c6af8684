"""Computing neighbouring layers in one: tracing code, searching its graph for patterns, hosting what was found."""
