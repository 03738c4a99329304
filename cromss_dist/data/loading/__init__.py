"""From shards to what the model sees: order, batches, transforms."""
