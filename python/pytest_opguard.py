"""opguard's pytest plugin."""
