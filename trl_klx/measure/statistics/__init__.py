"""From tokens to tables: classes of tokens, spikes, means with standard errors, and the policies against each other."""
