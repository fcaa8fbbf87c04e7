"""What a patient's presence can change, counted."""
