"""Training of one client: layers, local steps, private steps, and the algorithms."""
