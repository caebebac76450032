"""What would this command do? Nothing is trained, no folder is made."""
