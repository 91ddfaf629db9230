"""The proof of the speed claims: the same model saved in every way that a user could pick, in one run."""
