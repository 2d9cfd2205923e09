"""minippo beside TRL: time, memory, distance from the floor, and gold at equal time."""
