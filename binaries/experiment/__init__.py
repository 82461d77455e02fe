"""One experiment of the paper: a task trained with an algorithm."""
