"""What the papers claim, what runs/ says of it, and how both are shown."""
