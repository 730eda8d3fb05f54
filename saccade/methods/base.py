"""The ladder: what a method is. Implement the lowest rung that your method allows."""
