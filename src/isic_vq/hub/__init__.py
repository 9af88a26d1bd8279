"""A Hub repository: opened, exported, described, pushed and pulled."""
