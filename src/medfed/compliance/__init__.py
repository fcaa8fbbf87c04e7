"""What happened, so that it can be checked afterwards."""
