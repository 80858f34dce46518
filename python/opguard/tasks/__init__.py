"""Ready-made `OpGuardBase` classes for common tasks; each module is one field.

They are small on purpose: read one to see what a subclass has to say.
"""
