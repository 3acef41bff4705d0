"""What a teacher computed, stored once."""
