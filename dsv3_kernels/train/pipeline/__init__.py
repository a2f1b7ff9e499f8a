"""Schedules as lists of actions, their simulation, and what runs them on the ranks of a pipeline."""
