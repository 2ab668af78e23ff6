"""What other people's packages may add to the benchmark."""
