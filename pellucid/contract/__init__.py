"""What the engine and an executor may know of each other: plans, batches, wanted rows, the executor's interface. Plain data."""
