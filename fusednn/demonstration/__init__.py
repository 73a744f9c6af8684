"""One network trained twice on handwritten digits, stock and fused, step by step in turns.

Both start from the same weights and see the same batches, so their losses have to agree: exactly where both call the
same operators (CPU), within float32's rounding where one of them runs kernels.
"""
