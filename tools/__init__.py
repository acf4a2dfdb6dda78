"""What writes parts of the repository from tables; tests hold what is written equal."""
