"""Which arm is better, by how much, and how sure that is: from a run's held-out answers alone."""
