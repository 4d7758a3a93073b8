"""What a run shows and leaves behind: banner, settings, table, pictures."""
