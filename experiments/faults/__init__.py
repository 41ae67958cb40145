"""What goes wrong in long runs, provoked, and what a user then sees and loses."""
