"""What several test files share: tiny models and data, their trainers, a Hub, and scripts for other processes."""
