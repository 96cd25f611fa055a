"""The paper's numbers: variance schedules, samplers as tables, noise as a function."""
