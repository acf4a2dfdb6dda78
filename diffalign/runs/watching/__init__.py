"""What runs look like from outside: their pages, made from the files of their folders alone. Needs no torch."""
