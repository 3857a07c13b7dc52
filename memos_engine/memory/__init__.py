"""The control plane: what is remembered, for whom, and which of it goes into a request. No torch here."""
