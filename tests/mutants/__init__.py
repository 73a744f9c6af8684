"""Mutation testing: small faults put into the library on purpose, one at a time, which the tests have to notice.

``make mutants SEED=1 NUMBER=20 FOLDERS="kernels autograd"`` takes a sample, runs for each mutant the tests of its
family and those of all families in both modes, and lists the survivors.  A survivor is a fault that the tests don't
see, or a change that changes nothing: a person judges.

The libraries that exist don't serve.  mutmut puts all mutants of a function side by side behind a dispatching one,
which Triton, that reads a kernel's source, can't compile; and it takes the folders for packages of their own names.
cosmic-ray rewrites files, as this does, but has one test command for all mutants, where a family's tests are a
hundredth of the suite.  Neither knows of masks, refusals or contiguity.
"""
