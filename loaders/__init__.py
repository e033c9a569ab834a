"""From shards to batches: order, reading, decoding, and the loaders that training uses."""
