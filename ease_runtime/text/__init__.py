"""Between text and tokens: streamed text, stop strings, special and unknown tokens."""
