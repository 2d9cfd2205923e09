"""The engine: what lets the same few lines train a tiny model on a laptop and a large one on GPUs.

The teaching path meets it at one seam of three things. *Look* (look.py, and passes.py for a single
pass): a model and a batch of the contract in, its (B, R) tensors out, with gradient where gradients
are on. *Accumulate* (gradients.py): the gradients of a loss, from a few rows at a time. *Step*
(gradients.py): clip, move, clear. A batch gets what it can do from `Rows` (packing.py), models are
read by loading.py. Behind the seam stand packing (rows without padding), micro-batches, processes
(ranks), devices and precision: a reader of the path can do without all of it. The engine knows the
settings and the formulas, and no training.
"""
