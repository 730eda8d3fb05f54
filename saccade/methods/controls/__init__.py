"""Controls: what every method is measured against."""
