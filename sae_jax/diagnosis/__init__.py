"""Before training: what would die and what helps. Of SAEs that exist: who is dead, and why."""
