"""One module a kind of fault. Each has `inject(ground)`, which yields an `Outcome` for every injection."""
