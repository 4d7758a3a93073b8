"""What is measured while training: KL statistics, the metrics file, the progress bar and the pictures of a run."""
