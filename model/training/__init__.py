"""How it learns: configuration, optimiser, state, the loop and its evaluation."""
