"""How the players of a method are made from the teacher and trained: the loop, the optimisers, the memory."""
