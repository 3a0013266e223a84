"""What a run leaves for people: model cards, the page of a run, and what goes to the Hub."""
