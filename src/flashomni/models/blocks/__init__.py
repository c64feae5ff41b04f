"""What the blocks of several models share."""
