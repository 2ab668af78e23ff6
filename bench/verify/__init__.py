"""Whether a recorded result comes out again, and what differs where it does not."""
