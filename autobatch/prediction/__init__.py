"""A training step without its GPU: what it would allocate, and what the caching allocator would make of that."""
