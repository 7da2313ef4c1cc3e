"""ease_eval: what early exits cost in perplexity and save in time, measured through the runtime's own engine."""
