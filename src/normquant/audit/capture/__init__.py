"""A live compile for a target GPU that need not be present, stopped where its code would be compiled."""
