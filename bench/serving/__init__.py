"""One frozen backbone in memory that serves."""
