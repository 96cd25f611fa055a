"""This machine, for people: its state, and what is installed here for what."""
