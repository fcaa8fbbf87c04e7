"""What stands for or against a claim: twins, exact tests, attacks, comparisons."""
