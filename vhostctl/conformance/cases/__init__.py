"""The rules: every module here is a group, every case in it one rule."""
