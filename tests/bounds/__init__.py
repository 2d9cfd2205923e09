"""What a file can do to the reader, and a long training to the memory: limits, and what is met."""
