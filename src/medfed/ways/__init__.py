"""How the rows of a round come together: one file a way, and what all of them share."""
