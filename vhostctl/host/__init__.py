"""One object per kernel thing, one owned descriptor each."""
