"""How close two networks are, and warnings that a run has gone wrong."""
