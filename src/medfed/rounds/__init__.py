"""A round: who does what in which order, and how rows come together."""
