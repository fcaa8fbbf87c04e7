"""What follows from a study and public facts before the first round: choices, refusals,
the plan.
"""
