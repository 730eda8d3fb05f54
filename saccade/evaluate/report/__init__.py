"""What an evaluation leaves for people: an HTML page, pictures, plots."""
