"""Sources, splits, preprocessing: from tables at sites to numbers."""
