"""What an update does and costs, before any weight is loaded."""
