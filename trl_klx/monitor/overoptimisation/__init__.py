"""The gold reward against the KL: its law, its turn, and its picture."""
