"""From a checkpoint to a quantized checkpoint, a shard at a time, with no model in memory."""
