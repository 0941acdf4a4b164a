"""How close two networks are, and signs that a run has gone wrong."""
