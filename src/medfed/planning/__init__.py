"""What follows from a study and public facts before round one: choices, refusals, the plan."""
