"""What lets the real trainers run on machines that they were not written for. Never imported where there is a GPU."""
