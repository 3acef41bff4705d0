"""A lean loop that distils code models with the losses of kdkernels."""
