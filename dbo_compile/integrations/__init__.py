"""Libraries that dbo-compile works with; importing one registers with it."""
