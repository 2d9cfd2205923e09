"""Worlds whose truth is known: one small enough to be exact, one to learn preferences from."""
