"""The processes of a run: who holds what, and how they find each other and end together."""
