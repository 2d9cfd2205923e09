"""The commands: what they run, write, show and report."""
