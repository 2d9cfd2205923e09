"""`python -m minippo`, and `torchrun -m minippo` for several processes."""

from minippo.app.cli import main

main()
