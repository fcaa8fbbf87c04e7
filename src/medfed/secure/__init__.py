"""Rows that nobody sees: fixed point, masks, shares, and who says so."""
