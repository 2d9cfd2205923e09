"""minippo: RLHF with PPO, every part written out in plain torch, small enough to read."""

__version__ = "0.1.0"
