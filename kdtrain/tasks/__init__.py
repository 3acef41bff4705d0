"""What differs between the tasks."""
