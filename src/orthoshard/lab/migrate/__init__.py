"""``orthoshard migrate``: from AdamW's settings to groups whose updates are of the same size, with the reasons."""
