"""What a start leaves behind for the next start of the same model, in the user's cache."""
