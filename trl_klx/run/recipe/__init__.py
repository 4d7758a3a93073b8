"""What a recipe is: its fields, how it is read, and what each algorithm makes of it."""
