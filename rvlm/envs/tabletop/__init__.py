"""A MuJoCo tabletop with scripted experts, several arms and domain switches."""
