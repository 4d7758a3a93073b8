"""The frozen reference: made from the policy as given, known again, and kept when a run is resumed."""
