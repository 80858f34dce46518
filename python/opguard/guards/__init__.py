"""The guards."""
