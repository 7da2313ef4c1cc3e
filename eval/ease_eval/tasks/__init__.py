"""Task files, lm_eval, and the likelihoods and grading that both need."""
