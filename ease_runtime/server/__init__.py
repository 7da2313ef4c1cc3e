"""An OpenAI-compatible server over a bundle (the extra `serve`)."""
