"""What a run leaves for people to look at: plots, a page, a summary. No torch in here."""
