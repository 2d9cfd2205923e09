"""`python -m minippo`, and `torchrun -m minippo` for several processes."""

from minippo.cli import main

main()
