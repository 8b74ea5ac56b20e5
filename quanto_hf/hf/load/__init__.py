"""From a checkpoint to a model: the quantizer of transformers, its hooks, and the methods by which it is found."""
