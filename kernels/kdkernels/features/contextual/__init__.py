"""`contextual_relation_loss`: relations of tokens to their neighbours, and of layers to each other."""
