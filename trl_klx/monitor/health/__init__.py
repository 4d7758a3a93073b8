"""Health alarms: warnings about what goes wrong in a run."""
