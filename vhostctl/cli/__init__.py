"""click commands: parse, call, render; nothing else."""
