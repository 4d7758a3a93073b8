"""What a run shows and leaves behind: banner, settings, sampled answers, table, pictures."""
