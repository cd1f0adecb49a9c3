"""What is selected of long texts, and what they come to in bytes."""
