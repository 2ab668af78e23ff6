"""What a model costs: FLOPs counted and in closed form, latency, memory, size."""
