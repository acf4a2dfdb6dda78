"""What every room stands on: several processes as one, keyed randomness, memory that ran out, files that are whole or absent."""
