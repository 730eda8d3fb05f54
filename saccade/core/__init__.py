"""What a call, a pattern and a plan are. Imports torch and nothing of saccade above this floor."""
