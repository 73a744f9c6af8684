"""Mutation testing: small faults put into the library on purpose, one at a time, which the tests have to notice.

``make mutants SEED=1 NUMBER=20 FOLDERS="kernels autograd"`` takes a sample, runs for each mutant the tests that belong
to it in the modes of ``make test``, and lists the survivors; ``SINCE=main`` changes nothing but lines that differ from
a commit's, as continuous integration does; ``PLANTED=1`` puts in faults that once passed (`mutants.planted`).  A
survivor is a fault that the tests don't see, or a change that changes nothing: a person judges.  ``results/`` holds
samples that were judged, and says why.

To a mutant belong the tests of the families whose files use its file and what is defined around it, those of its theme
(fusion, replacement, libraries, optimizers), and of the tests that go through every operation the cases of those
families.

The goal is that of those that change something 95 of 100 are noticed by what ``make test`` runs.  As they were drawn,
before the survivors got tests, it was 43 of 51 (seed 73), 30 of 38 (seed 1129) and 54 of 57 (seed 4711), all but met.
The survivors were single holes rather than one kind: pairs that sampled grids leave out, paths of single examples,
defaults, sizes, some operands' gradients without others'.  Each got a test of all families where one fits; what is left
to do is the next sample.

A mutant's tests end with the first that fails; one case of each test function comes before the second of any.  Of those
that didn't end within ``--limit`` seconds of processor time it is undecided whether they'd have noticed.

The libraries that exist were tried, and don't serve.  mutmut 3.8 leaves decorated functions alone, so it changes no
kernel; and finds no tests for the rest, since it takes the folders for packages of their own names.  cosmic-ray 8.7
replaces each operator by each other: of 140 mutants of kernels/rrelu.py 110 are of a ``+``, a ``-`` or a ``*``, mostly
pointers that are shifted or divided, which don't run.  It rewrites the file that is imported, and starts Python for
each mutant with one command for all, where a family's tests are a hundredth of the suite.  Neither mutates masks,
refusals, memory or marks.
"""
