"""What the scripts stand on and the method does not: files, checkpoints, long runs, pairs, tars, cache."""
