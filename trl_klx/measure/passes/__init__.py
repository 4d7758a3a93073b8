"""One pass of each model over the responses: what is read, what each model gives, and what is kept on disk."""
